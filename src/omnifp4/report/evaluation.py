"""Evaluations as a person reads them in a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from omnifp4.receipt.base import Verdict
from omnifp4.receipt.evaluation import Estimate, EvaluationReceipt, Gate, HarnessReceipt, SpeechResult
from omnifp4.report.figures import figure, size_text
from omnifp4.report.terminal import VERDICT_STYLES


def evaluation_text(receipt: EvaluationReceipt) -> RenderableType:
    """Figures by modality beside the noise floor, tasks, speech, layers, and the limits."""
    title = f"{receipt.model} against {receipt.against}: {receipt.samples:,} samples ({receipt.data}), {receipt.dtype}"
    parts: list[RenderableType] = [Text(title)]
    if receipt.modalities:
        parts.append(_modalities(receipt))
    if receipt.tasks:
        parts.append(_tasks(receipt))
    if receipt.speech is not None:
        parts.append(_speech(receipt.speech))
    if receipt.layers:
        parts.append(_layers(receipt))
    lines = [
        f"{one.modality}: {one.model.non_finite:,} of {one.positions:,} positions of the model are not finite"
        for one in receipt.modalities
        if one.model.non_finite
    ]
    lines += [
        f"layer {one.layer}: {one.non_finite:,} positions of the model are not finite"
        for one in receipt.layers
        if one.non_finite
    ]
    lines += [f"noise floor: {receipt.noise_floor}; distributions: {receipt.distributions}"]
    lines += [f"note: {note}" for note in receipt.notes]
    if receipt.segmented:
        lines.append(f"layer by layer from disk: {', '.join(receipt.segmented)}")
    cached = (
        f", {receipt.reference_cached:,} of the reference's samples from the cache" if receipt.reference_cached else ""
    )
    lines.append(
        f"{receipt.seconds:.1f} s on {receipt.device}, peak memory {size_text(receipt.peak_memory_bytes)}{cached}; "
        f"intervals: 95 %, {receipt.resamples:,} paired resamples; metric version {receipt.metric_version}"
    )
    return Group(*parts, Text("\n".join(lines)), limits_text(receipt.gates, receipt.verdict))


def harness_text(receipt: HarnessReceipt) -> RenderableType:
    """Every metric of every task."""
    where = f" on {receipt.server}" if receipt.server else ""
    table = narrow_table(
        f"{receipt.model}{where}, lm-eval {receipt.harness}", "task", "metric", "value", "±", "documents"
    )
    for one in receipt.results:
        error = "" if one.standard_error is None else figure(one.standard_error)
        table.add_row(one.task, one.metric, figure(one.value), error, "" if one.samples is None else f"{one.samples:,}")
    return Group(table, Text(f"{receipt.seconds:.1f} s"), limits_text(receipt.gates, receipt.verdict))


def narrow_table(title: str, *columns: str) -> Table:
    """Eighty columns are enough for every table here; a narrower terminal folds words and cuts off none."""
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _modalities(receipt: EvaluationReceipt) -> Table:
    table = narrow_table("", "in", "KL", "95 %", "floor", "p99", "top-1", "ppl ×", "95 %")
    for one in receipt.modalities:
        model, floor = one.model, one.floor
        table.add_row(
            one.modality, figure(model.kl_mean.value), _span(model.kl_mean),
            figure(floor.kl_mean.value) if floor else "-", figure(model.kl_p99), f"{model.top1_agreement.value:.1%}",
            figure(model.perplexity_ratio.value), _span(model.perplexity_ratio),
        )  # fmt: skip
    return table


def _tasks(receipt: EvaluationReceipt) -> Table:
    table = narrow_table("", "right answers", "samples", "before", "after", "points", "95 %", "floor", "lost", "gained")
    for one in receipt.tasks:
        noise = "-" if one.floor is None else f"{100 * (one.floor - one.reference):+.1f}"
        table.add_row(
            one.task, f"{one.samples:,}", f"{one.reference:.1%}", f"{one.model:.1%}",
            f"{100 * one.difference.value:+.1f}", _point_span(one.difference), noise, f"{one.lost}", f"{one.gained}",
        )  # fmt: skip
    return table


def _point_span(difference: Estimate) -> str:
    return f"{100 * difference.low:+.1f} … {100 * difference.high:+.1f}"


def _span(estimate: Estimate) -> str:
    return f"{figure(estimate.low)} … {figure(estimate.high)}"


def _layers(receipt: EvaluationReceipt) -> Table:
    table = narrow_table("", "after layer", "relative error", "floor", "mean cosine", "same experts")
    for one in receipt.layers:
        table.add_row(
            str(one.layer), figure(one.relative_error), "-" if one.floor is None else figure(one.floor),
            f"{one.cosine:.6f}", "-" if one.routing_agreement is None else f"{one.routing_agreement:.1%}",
        )  # fmt: skip
    return table


def _speech(speech: SpeechResult) -> Table:
    """A row a figure: the model, its interval, and the noise floor."""
    table = narrow_table("", f"speech: {speech.utterances:,} texts, {speech.frames:,} frames", "model", "95 %", "floor")
    floor = speech.floor

    def row(name: str, model: str, interval: str = "", noise: str = "-") -> None:
        table.add_row(name, model, interval, noise)

    for name, share, noise in (
        ("codes equal, free-running", speech.code_agreement, floor.code_agreement if floor else None),
        ("next code equal, given the past", speech.first_code_agreement, floor.first_code_agreement if floor else None),
    ):
        row(name, f"{share.value:.1%}", f"{share.low:.1%} … {share.high:.1%}", f"{noise.value:.1%}" if noise else "-")
    drifts = enumerate(speech.drift)
    parts = [(f"  quarter {n + 1} of the {speech.long_utterances:,} longest", part, n) for n, part in drifts]
    for name, part, number in [("next code KL, given the past", speech.code_kl_mean, -1), *parts]:
        own = None if floor is None else floor.code_kl_mean if number < 0 else floor.drift[number]
        row(name, figure(part.value), _span(part), figure(own.value) if own else "-")
    if (later := speech.later_code_kl_mean) is not None:
        own = floor.later_code_kl_mean if floor is not None else None
        row("  of the frame's other codes", figure(later.value), _span(later), figure(own.value) if own else "-")
    row(
        "frames, times the reference's",
        f"{speech.frames_ratio:.3f}",
        noise=f"{floor.frames_ratio:.3f}" if floor else "-",
    )
    if (heard := speech.recognition) is not None:
        again = floor.recognition if floor else None
        row(f"digits understood, of {heard.utterances:,}: before", f"{heard.reference:.1%}")
        row("  after", f"{heard.model:.1%}", "", f"{again.model:.1%}" if again else "-")
        row(
            "  points", f"{100 * heard.difference.value:+.1f}", _point_span(heard.difference),
            f"{100 * again.difference.value:+.1f}" if again else "-",
        )  # fmt: skip
    if speech.non_finite:
        row("utterances that are not finite", f"{speech.non_finite:,}", "", f"{floor.non_finite:,}" if floor else "-")
    return table


def limits_text(gates: tuple[Gate, ...], verdict: Verdict) -> Text:
    """Limits that were set and what they met, then the verdict."""
    text = Text()
    for gate in gates:
        text.append(f"{gate.option} {gate.limit:g}: {figure(gate.value)} ({gate.where}) ")
        text.append(f"{gate.verdict.value}\n", style=VERDICT_STYLES[gate.verdict])
    shown = "no limits were set" if verdict is Verdict.NOT_CHECKED else verdict.value.upper()
    text.append(shown, style=VERDICT_STYLES[verdict])
    return text


def interval(estimate: Estimate) -> str:
    """A figure with its 95 % interval."""
    return f"{figure(estimate.value)} ({figure(estimate.low)} to {figure(estimate.high)})"
