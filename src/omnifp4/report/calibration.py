"""Calibration sets and statistics as a person reads them in a terminal."""

from __future__ import annotations

import statistics

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from omnifp4.receipt.calibration import CalibrationReceipt, SetReceipt
from omnifp4.report.figures import size_text


def set_text(receipt: SetReceipt, out: str) -> RenderableType:
    """Conversations and tokens by modality."""
    kinds = sorted(receipt.tokens, key=receipt.tokens.__getitem__, reverse=True)
    table = _table("conversations", "", *(f"{kind} tokens" for kind in kinds))
    for one in receipt.modalities:
        table.add_row(one.modality, f"{one.conversations:,}", *(f"{one.tokens.get(kind, 0):,}" for kind in kinds))
    table.add_row("all", f"{receipt.conversations:,}", *(f"{receipt.tokens[kind]:,}" for kind in kinds))
    tail = (
        f"{out}: {len(receipt.files):,} files from {receipt.source}, {receipt.spoken:,} answers to be spoken; tokens "
        f"counted by the processor of {receipt.counted_by}; sha256 {receipt.sha256[:16]}…"
    )
    return Group(table, Text(tail))


def calibration_text(receipt: CalibrationReceipt, out: str) -> RenderableType:
    """Tokens of each layer's experts, what has statistics and what has none, and failures."""
    parts: list[RenderableType] = []
    if receipt.experts:
        least = receipt.least_tokens
        table = _table("tokens of the experts of", "fewest", "median", "most", "never", f"< {least}", "data-free")
        for one in receipt.experts:
            counts = one.tokens
            table.add_row(
                one.experts.removesuffix(".mlp.experts"), f"{min(counts):,}", f"{statistics.median(counts):,.0f}",
                f"{max(counts):,}", f"{counts.count(0):,}", f"{one.too_few:,}", f"{one.data_free:,}",
            )  # fmt: skip
        parts.append(table)
    went = receipt.samples - len(receipt.failures)
    read = ", ".join(f"{count:,} {kind}" for kind, count in receipt.tokens.items())
    lines = [f"{went:,} of {receipt.samples:,} samples of {receipt.data}; tokens: {read}"]
    if receipt.left_out:
        left = ", ".join(f"{count:,} {modality}" for modality, count in receipt.left_out.items())
        lines.append(f"left out, since a {receipt.model_type} does not read them: {left}")
    if receipt.experts:
        starved = sum(one.too_few for one in receipt.experts)
        free = sum(one.data_free for one in receipt.experts)
        lines.append(
            f"experts below {receipt.least_tokens:,} routed tokens: {starved:,} of "
            f"{sum(len(one.tokens) for one in receipt.experts):,}; {starved - free:,} take the all-expert statistics, "
            f"{free:,} the data-free rule"
        )
    captured = ", ".join(f"{name} {count:,}" for name, count in receipt.components.items())
    lines.append(f"linears with statistics: {captured}")
    if receipt.gradient_positions:
        lines.append(f"squared gradients: of {receipt.gradient_positions:,} positions of what is said")
    reasons: dict[str, list[str]] = {}
    for name, reason in receipt.not_captured.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"without: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    resumed = f", {receipt.resumed_layers:,} layers from an earlier run" if receipt.resumed_layers else ""
    lines.append(
        f"{out}: {receipt.seconds:.1f} s on {receipt.device} in {receipt.dtype}{resumed}, peak memory "
        f"{size_text(receipt.peak_memory_bytes)}"
    )
    parts.append(Text("\n".join(lines)))
    if receipt.failures:
        first = receipt.failures[0]
        named = first.layer is None or first.error.startswith(f"layer {first.layer}: ")
        where = "" if named else f", layer {first.layer}"
        told = (
            f"{len(receipt.failures):,} of {receipt.samples:,} samples failed; the first: {first.sample!r}{where}: "
            f"{first.cause.value}: {first.error}"
        )
        parts.append(Text(told, style="bold yellow"))
    return Group(*parts)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table
