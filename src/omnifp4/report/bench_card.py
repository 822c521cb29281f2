"""A measurement as a person reads it in a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from omnifp4.receipt.base import Verdict
from omnifp4.receipt.bench import BenchReceipt, Measured, Spread, TierVerdict
from omnifp4.report.figures import size_text
from omnifp4.report.terminal import VERDICT_STYLES

TIER_STYLES = {TierVerdict.PASS: "green", TierVerdict.FAIL: "bold red", TierVerdict.NOT_MEASURED: "yellow"}


def bench_text(receipt: BenchReceipt) -> RenderableType:
    """The card: machine, each model, ratios, tiers."""
    machine, settings = receipt.machine, receipt.settings
    head = Text(
        f"{machine.device}, torch {machine.torch}, transformers {machine.transformers}"
        f"{f', triton {machine.triton}' if machine.triton else ''}; {receipt.environment.made_at}\n"
        f"copy bandwidth, read and write: {machine.copy_bytes_per_second.median / 1e9:,.0f} GB/s"
        f" ({machine.copy_bytes_per_second.least / 1e9:,.0f} to {machine.copy_bytes_per_second.most / 1e9:,.0f})\n"
        f"greedy, {settings.new_tokens} new tokens, random prompts all different, median (least to most) of"
        f" {settings.repeats}; warm-up is not counted"
    )
    shown: list[RenderableType] = [head, *_model(receipt.model)]
    if receipt.against is not None:
        shown += _model(receipt.against)
    if receipt.ratios:
        shown.append(_ratios(receipt))
    end = "every check passed" if receipt.passed else "A CHECK FAILED: that model gets no figure of speed"
    shown.append(Text(f"{end}; {receipt.seconds:.0f} s in all", style="" if receipt.passed else "bold red"))
    return Group(*shown)


def _model(one: Measured) -> list[RenderableType]:
    memory = one.memory
    came = (
        f"loaded in {one.load_seconds:.2f} s"
        if one.load_seconds is not None
        else f"made in {one.make_seconds or 0:.1f} s"
    )
    lines = [
        "",
        f"{one.model}: {one.layers} layers, {one.weights}; {came}",
        f"engine {one.engine}: {one.engine_reason}",
        f"weights on the device {size_text(memory.weight_bytes)} ({memory.weight_bytes / 2**30:.1f} GiB): "
        + ", ".join(f"{part} {size_text(size)}" for part, size in memory.weights.items()),
    ]
    if memory.peak_bytes is not None and memory.loading_peak_bytes is not None:
        lines.append(
            f"most in use: {size_text(memory.loading_peak_bytes)} while loading, {size_text(memory.peak_bytes)} while measured"
        )
    shown: list[RenderableType] = [Text("\n".join(lines))]
    for check in one.checks:
        line = Text(f"{check.verdict.value}: ", style=VERDICT_STYLES[check.verdict])
        line.append(f"{check.title}; {check.summary}", style="default")
        for finding in check.findings if check.verdict is Verdict.FAIL else ():
            line.append(f"\n  - {finding}", style="default")
        if check.fix:
            line.append(f"\n  fix: {check.fix}", style="default")
        shown.append(line)
    if one.prefill:
        shown.append(_prefill(one))
    if one.decode:
        shown += [_decode(one), *_notes(one)]
    if one.speech is not None:
        shown.append(Text(_speech(one)))
    shown.append(_tiers(one))
    return shown


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _prefill(one: Measured) -> Table:
    table = _table("prompt", "time to first token, ms", "prefill, tok/s")
    for row in one.prefill:
        first = _spread(row.first_token_seconds, 1000) if row.first_token_seconds else "not measured"
        table.add_row(f"{row.prompt_tokens:,}", first, _spread(row.tokens_per_second))
    return table


def _decode(one: Measured) -> Table:
    table = _table("decode", "context", "new", "tok/s", "GB a step", "bound, tok/s", "of it")
    for row in one.decode:
        table.add_row(
            f"batch {row.batch}",
            f"{row.prompt_tokens:,}",
            f"{row.new_tokens}",
            _spread(row.tokens_per_second) if row.tokens_per_second else "not measured",
            f"{row.step_bytes / 1e9:.3g}",
            f"{row.bound_tokens_per_second:,.0f}",
            f"{row.fraction:.1%}" if row.fraction is not None else "",
        )
    return table


def _notes(one: Measured) -> list[RenderableType]:
    lines = [
        f"not measured: batch {row.batch}, context {row.prompt_tokens:,}: {row.not_measured}"
        for row in one.decode
        if row.not_measured
    ]
    lines += [
        f"not measured: prompt of {row.prompt_tokens:,}: {row.not_measured}" for row in one.prefill if row.not_measured
    ]
    lines += [
        f"batch {row.batch} reads {row.distinct_experts:.1f} experts a layer"
        + (
            f" ({row.how}; uniform routing would give {row.uniform_experts:.1f})"
            if row.measured
            else f" (expected: {row.how})"
        )
        for row in one.routing
    ]
    for cache in one.cache:
        what = (
            f"batch {cache.batch}, context {cache.from_tokens:,} to {cache.to_tokens:,}: "
            f"{cache.extra_seconds * 1e3:.3g} ms a step"
        )
        if cache.bytes_per_second is None or cache.fraction is None:
            lines.append(f"{what}: the longer cache costs nothing that can be measured")
        else:
            rate = f"{size_text(round(cache.bytes_per_second))}/s, {cache.fraction:.1%} of the copy bandwidth"
            lines.append(f"{what} more for {size_text(cache.extra_bytes)} more of the cache: {rate}")
    return [Text("\n".join(lines))] if lines else []


def _speech(one: Measured) -> str:
    row = one.speech
    assert row is not None
    if row.real_time_factor is None or row.first_sound_seconds is None:
        return f"speech not measured: {row.not_measured}"
    return (
        f"speech, one stream of {row.audio_seconds:.1f} s (talker, code predictor, code2wav): real-time factor "
        f"{_spread(row.real_time_factor)}, first sound after {_spread(row.first_sound_seconds, 1000)} ms; {row.how}"
    )


def _tiers(one: Measured) -> Text:
    text = Text("")
    for number, tier in enumerate(one.tiers):
        text.append("\n" if number else "")
        text.append(
            f"tier {tier.name} (below {tier.most_gib:g} GiB, above {tier.least_tokens_per_second:g} tok/s), loaded {tier.parts}: "
        )
        text.append(tier.verdict.value, style=TIER_STYLES[tier.verdict])
        text.append(f", {tier.reason}")
    return text


def _ratios(receipt: BenchReceipt) -> Table:
    assert receipt.against is not None
    table = _table(f"against {receipt.against.model}, {receipt.against.weights}", "this", "reference", "times better")
    for row in receipt.ratios:
        table.add_row(row.figure, f"{row.model:,.4g}", f"{row.reference:,.4g}", f"{row.ratio:.2f}")
    return table


def _spread(value: Spread | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    median, least, most = (_number(one * scale) for one in (value.median, value.least, value.most))
    return f"{median} ({least} to {most})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" if value >= 100 else f"{value:.3g}"
