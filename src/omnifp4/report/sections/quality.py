"""What FP4 costs in answers: divergence by modality, known answers, speech, and other tools' tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omnifp4.receipt.base import Verdict
from omnifp4.receipt.evaluation import (
    Divergence,
    Estimate,
    EvaluationReceipt,
    Gate,
    Recognition,
    SpeechFloor,
    SpeechResult,
)
from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.figures import figure
from omnifp4.report.gathering import folder_name
from omnifp4.report.plots.changes import changes_plot
from omnifp4.report.plots.divergence import divergence_plot
from omnifp4.report.plots.rows import Row
from omnifp4.report.sections.base import TO, Figure, Section, Table, percent

TITLE = "What it costs in answers"


def quality_section(receipt: GatheredReceipt) -> Section:
    """Every evaluation; the noise floor stands beside each figure."""
    evaluations = receipt.judged
    if not evaluations and not receipt.harness:
        return Section("quality", TITLE, missing="omnifp4 evaluate OUT --against MODEL --receipt evaluate.json")
    labels = labels_of(evaluations)
    rows, changes = divergence_rows(evaluations, labels), change_rows(evaluations, labels)
    figures = []
    if rows:
        title = "Mean KL divergence from the reference by modality"
        figures.append(
            Figure(
                "Mean Kullback-Leibler divergence of next-token distributions from the reference, by modality of the input. "
                "Left is better; below the noise floor nothing can be told from the reference itself.",
                lambda key, width: divergence_plot(
                    rows, key=key, width=width, title=title, axis="mean KL divergence, nats per token"
                ),
            )
        )
    if changes:
        figures.append(
            Figure(
                "Share of known answers that are given, and of spoken digits that are understood: change against the "
                "reference in points. Left of the line is worse.",
                lambda key, width: changes_plot(
                    changes, key=key, width=width, title="Right answers, change against the reference",
                    axis="change in points",
                ),
            )
        )  # fmt: skip
    tables = [
        table
        for table in (
            divergence_table(evaluations, labels),
            task_table(evaluations, labels),
            speech_table(evaluations, labels),
            drift_table(evaluations, labels),
            layer_table(evaluations, labels),
            gate_table(receipt, labels),
            harness_table(receipt),
        )
        if table.rows
    ]
    notes = [
        f"{label}: {item.samples:,} samples of {folder_name(item.data)} (SHA-256 {item.data_sha256[:12]}), {item.dtype} on {item.device}; "
        f"intervals are 95\u00a0%, {item.resamples:,} resamples; noise floor: {item.noise_floor}"
        for label, item in zip(labels, evaluations, strict=True)
    ]
    notes += [f"{label}: {note}" for label, item in zip(labels, evaluations, strict=True) for note in item.notes]
    lead = _lead(evaluations[0]) if evaluations else "Tasks of lm-eval; nothing was compared with the reference."
    lead += _gates_told(gates_of(receipt, labels))
    return Section("quality", TITLE, lead, tuple(figures), tuple(tables), tuple(notes))


def labels_of(evaluations: tuple[EvaluationReceipt, ...]) -> list[str]:
    """A name for each evaluation: its artifact's folder, numbered where two are alike."""
    names = [folder_name(item.model) for item in evaluations]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]


def worst_modality(evaluation: EvaluationReceipt) -> tuple[str, Divergence, Divergence | None] | None:
    """The modality with the largest mean divergence, and its noise floor; None if none was measured."""
    if not evaluation.modalities:
        return None
    worst = max(evaluation.modalities, key=lambda item: item.model.kl_mean.value)
    return worst.modality, worst.model, worst.floor


def divergence_rows(evaluations: tuple[EvaluationReceipt, ...], labels: list[str]) -> tuple[Row, ...]:
    """Modalities; of several evaluations, a group for each modality."""
    modalities = list(dict.fromkeys(item.modality for evaluation in evaluations for item in evaluation.modalities))
    rows = []
    for modality in modalities:
        for label, evaluation in zip(labels, evaluations, strict=True):
            for item in evaluation.modalities:
                if item.modality == modality:
                    kl = item.model.kl_mean
                    floor = item.floor.kl_mean.value if item.floor else None
                    name, group = (modality, "") if len(evaluations) == 1 else (label, modality)
                    rows.append(Row(name, kl.value, kl.low, kl.high, floor, group))
    return tuple(rows)


def change_rows(evaluations: tuple[EvaluationReceipt, ...], labels: list[str]) -> tuple[Row, ...]:
    """Right answers by task, and spoken digits that are understood, in points; of several evaluations, a group for each."""
    found: dict[str, list[Row]] = {}
    for label, evaluation in zip(labels, evaluations, strict=True):
        changes = [(task.task, task.reference, task.samples, task.difference, task.floor) for task in evaluation.tasks]
        if heard := evaluation.speech.recognition if evaluation.speech else None:
            again = evaluation.speech.floor.recognition if evaluation.speech and evaluation.speech.floor else None
            floor = again.model if again else None
            changes.append(("spoken answer", heard.reference, heard.utterances, heard.difference, floor))
        for task, reference, samples, difference, floor in changes:
            group = f"{task}, {percent(reference)} of {samples:,} before" if len(evaluations) > 1 else ""
            changed = None if floor is None else 100 * (floor - reference)
            value, low, high = (100 * share for share in (difference.value, difference.low, difference.high))
            row = Row(label if group else task, value, low, high, changed, group)
            found.setdefault(group or task, []).append(row)
    rows = [row for several in found.values() for row in several]
    return tuple(row for row in rows if all(map(math.isfinite, row.numbers)))


def divergence_table(evaluations: tuple[EvaluationReceipt, ...], labels: list[str]) -> Table:
    """KL, top-1 agreement and perplexity ratio of each modality."""
    broken = any(item.model.non_finite for evaluation in evaluations for item in evaluation.modalities)
    rows = []
    for label, evaluation in zip(labels, evaluations, strict=True):
        for item in evaluation.modalities:
            floor = figure(item.floor.kl_mean.value) if item.floor else "not measured"
            rows.append(
                (
                    item.modality if len(evaluations) == 1 else f"{item.modality} · {label}",
                    interval(item.model.kl_mean),
                    floor,
                    f"{figure(item.model.kl_median)} / {figure(item.model.kl_p90)} / {figure(item.model.kl_p99)}",
                    percent_interval(item.model.top1_agreement),
                    _ratio(item.model.perplexity_ratio),
                    f"{item.positions:,}",
                    *((f"{item.model.non_finite:,}",) if broken else ()),
                )
            )
    return Table(
        "Divergence from the reference by modality of the input",
        (
            "modality",
            "mean KL (95\u00a0%)",
            "noise floor",
            "median / p90 / p99",
            "top-1 agreement",
            "perplexity ratio",
            "positions",
            *(("not finite",) if broken else ()),
        ),
        tuple(rows),
        numeric=frozenset(range(1, 8 if broken else 7)),
        brief=(0, 1, 2, 4),
    )


def task_table(evaluations: tuple[EvaluationReceipt, ...], labels: list[str]) -> Table:
    """Answers that are known, before and after."""
    rows = tuple(
        (
            task.task if len(evaluations) == 1 else f"{task.task} · {label}",
            f"{task.samples:,}",
            percent(task.reference),
            percent(task.model),
            percent(task.floor),
            f"{100 * task.difference.value:+.2f} ({100 * task.difference.low:+.2f}{TO}{100 * task.difference.high:+.2f})",
        )
        for label, evaluation in zip(labels, evaluations, strict=True)
        for task in evaluation.tasks
    )
    return Table(
        "Known answers that are given exactly",
        ("task", "samples", "reference", "FP4", "noise floor", "difference in points (95\u00a0%)"),
        rows,
        numeric=frozenset(range(1, 6)),
        brief=(0, 2, 3, 5),
    )


def speech_table(evaluations: tuple[EvaluationReceipt, ...], labels: list[str]) -> Table:
    """Speech out, and the reference's own under the change of the noise floor."""
    spoken = [(label, item.speech) for label, item in zip(labels, evaluations, strict=True) if item.speech]
    rows: list[tuple[str, SpeechResult | SpeechFloor, int]] = []
    for label, speech in spoken:
        rows.append((label, speech, speech.utterances))
        if speech.floor is not None:
            rows.append(
                ("noise floor" if len(spoken) == 1 else f"{label}, noise floor", speech.floor, speech.utterances)
            )
    broken = any(speech.non_finite for _, speech, _ in rows)
    return Table(
        "Speech out",
        (
            "artifact",
            "utterances",
            "codes equal, free-running",
            "first codes equal, given the past",
            "code KL",
            "frames over reference's",
            "spoken digit understood",
            *(("not finite",) if broken else ()),
        ),
        tuple(
            (
                label,
                f"{utterances:,}",
                percent_interval(speech.code_agreement),
                percent_interval(speech.first_code_agreement),
                interval(speech.code_kl_mean),
                f"{speech.frames_ratio:.3f}",
                _heard(speech.recognition),
                *((f"{speech.non_finite:,}",) if broken else ()),
            )
            for label, speech, utterances in rows
        ),
        numeric=frozenset(range(1, 8 if broken else 7)),
        brief=(0, 2, 6),
    )


def _heard(heard: Recognition | None) -> str:
    return f"{percent(heard.reference)} → {percent(heard.model)}" if heard else "not measured"


def drift_table(evaluations: tuple[EvaluationReceipt, ...], labels: list[str]) -> Table:
    """Divergence of speech codes along the longest utterances."""
    spoken = [(label, item.speech) for label, item in zip(labels, evaluations, strict=True) if item.speech]
    drifts: list[tuple[str, tuple[Estimate, ...]]] = []
    for label, speech in spoken:
        drifts.append((label, speech.drift))
        if speech.floor is not None:
            drifts.append(("noise floor" if len(spoken) == 1 else f"{label}, noise floor", speech.floor.drift))
    most = max((len(drift) for _, drift in drifts), default=0)
    counted = ", ".join(dict.fromkeys(f"{speech.long_utterances:,}" for _, speech in spoken))
    return Table(
        f"Drift: mean KL of the first codes along the longest utterances ({counted})",
        ("artifact", *(f"part {number}" for number in range(1, most + 1))),
        tuple((label, *map(interval, drift), *("",) * (most - len(drift))) for label, drift in drifts if most),
        numeric=frozenset(range(1, most + 1)),
    )


def layer_table(evaluations: tuple[EvaluationReceipt, ...], labels: list[str]) -> Table:
    """Hidden states after each layer, where that was compared in place of answers."""
    broken = any(layer.non_finite for evaluation in evaluations for layer in evaluation.layers)
    rows = tuple(
        (
            str(layer.layer) if len(evaluations) == 1 else f"{layer.layer} · {label}",
            figure(layer.relative_error),
            f"{layer.cosine:.5f}",
            percent(layer.routing_agreement) if layer.routing_agreement is not None else "no experts",
            figure(layer.floor) if layer.floor is not None else "not measured",
            *((f"{layer.non_finite:,}",) if broken else ()),
        )
        for label, evaluation in zip(labels, evaluations, strict=True)
        for layer in evaluation.layers
    )
    return Table(
        "Hidden states after each layer against the reference",
        ("layer", "relative error", "cosine", "same experts", "noise floor", *(("not finite",) if broken else ())),
        rows,
        numeric=frozenset(range(1, 6 if broken else 5)),
        folded=len(rows) > 12,
    )


def gates_of(receipt: GatheredReceipt, labels: list[str]) -> list[tuple[str, Gate]]:
    """Every limit that was set, with the artifact that met it or not."""
    gates = [(label, gate) for label, item in zip(labels, receipt.judged, strict=True) for gate in item.gates]
    return gates + [(folder_name(item.model), gate) for item in receipt.harness for gate in item.gates]


def gate_table(receipt: GatheredReceipt, labels: list[str]) -> Table:
    """Limits that were set, and what they met."""
    gates = gates_of(receipt, labels)
    return Table(
        "Gates",
        ("gate", "artifact", "limit", "worst", "where", "verdict"),
        tuple(
            (gate.option, label, f"{gate.limit:g}", figure(gate.value), gate.where, gate.verdict.value)
            for label, gate in gates
        ),
        numeric=frozenset({2, 3}),
        states=tuple(gate.verdict.value for _, gate in gates),
        brief=(0, 2, 3, 4, 5),
    )


def _gates_told(gates: Sequence[tuple[str, Gate]]) -> str:
    failed = [gate.option for _, gate in gates if gate.verdict is Verdict.FAIL]
    if not gates:
        return ""
    kept = f"{len(gates) - len(failed)} of {len(gates)} gates pass"
    return f" {kept}; {', '.join(dict.fromkeys(failed))} failed." if failed else f" {kept}."


def harness_table(receipt: GatheredReceipt) -> Table:
    """Tasks of lm-eval."""
    rows = tuple(
        (
            result.task,
            folder_name(run.model),
            result.metric,
            figure(result.value),
            figure(result.standard_error) if result.standard_error is not None else "not given",
            f"{result.samples:,}" if result.samples is not None else "not given",
        )
        for run in receipt.harness
        for result in run.results
    )
    return Table(
        "Tasks of lm-eval",
        ("task", "model", "metric", "value", "standard error", "samples"),
        rows,
        numeric=frozenset({3, 4, 5}),
        brief=(0, 2, 3, 4),
    )


def interval(estimate: Estimate) -> str:
    """A value with its interval, such as ``0.0123 (0.0119 to 0.0128)``."""
    return f"{figure(estimate.value)} ({figure(estimate.low)}{TO}{figure(estimate.high)})"


def percent_interval(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    return f"{percent(estimate.value)} ({100 * estimate.low:.2f}{TO}{100 * estimate.high:.2f})"


def _ratio(estimate: Estimate) -> str:
    """A ratio near 1, whose distance from 1 matters."""
    return f"{estimate.value:.4f} ({estimate.low:.4f}{TO}{estimate.high:.4f})"


def _lead(evaluation: EvaluationReceipt) -> str:
    worst = worst_modality(evaluation)
    if worst is None:
        return f"Hidden states of {len(evaluation.layers)} layers were compared, not answers."
    name, model, floor = worst
    beside = f", with a noise floor of {figure(floor.kl_mean.value)}" if floor else ""
    told = f"Mean KL divergence is largest for {name}: {interval(model.kl_mean)} nats{beside}. "
    told += f"The likeliest token stays the same at {percent(model.top1_agreement.value)} of its positions."
    if evaluation.tasks:
        task = max(evaluation.tasks, key=lambda task: abs(task.difference.value))
        changed = f"The task that changes most is {task.task}: {percent(task.reference)} to {percent(task.model)}."
        told += f" {changed}" if task.difference.value else " No task is answered more or less often."
    return told
