"""A load test as a person reads it in a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from omnifp4.receipt.server_load import ServerLoadReceipt, Spread


def seconds_text(value: float | None) -> str:
    """Seconds, or milliseconds where they are less than one; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def server_load_text(receipt: ServerLoadReceipt) -> RenderableType:
    """Throughput first, then times by kind, then what went wrong."""
    trace = receipt.trace
    rate = f"{trace.rate_per_s:g} requests/s, {trace.arrivals}" if trace.rate_per_s else "as fast as it answers"
    engine = f" ({receipt.engine})" if receipt.engine else ""
    head = [
        f"{receipt.server}{engine}, model {receipt.model}",
        f"{trace.requests} requests, {rate}, at most {trace.concurrency} at once, up to {trace.max_tokens} tokens each; seed {trace.seed}",
    ]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("kind", "sent", "failed"):
        table.add_column(column, no_wrap=True, justify="left" if column == "kind" else "right")
    for column in ("TTFT ms", "TPOT ms", "end to end ms", "RTF"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = receipt.kinds if len(receipt.kinds) < 2 else (*receipt.kinds, receipt.all_kinds)
    for row in rows:
        times = [_pair(times, 1000.0) for times in (row.ttft_s, row.tpot_s, row.end_to_end_s)]
        table.add_row(row.kind, str(row.requests), str(row.failed), *times, _pair(row.speech_rtf, 1.0))
    failed = receipt.all_kinds.failed
    tail = [
        "times are p50 / p99",
        f"{receipt.output_tokens_per_s:,.1f} tokens/s and {receipt.requests_per_s:,.2f} requests/s over "
        f"{receipt.wall_s:.1f} s ({receipt.output_tokens:,} tokens, {_counted(receipt)})",
    ]
    if receipt.audio_seconds:
        tail.append(f"{receipt.audio_seconds:.1f} s of speech, {receipt.audio_seconds_per_s:.2f} s a second")
    if receipt.waited_s.count and (receipt.waited_s.most or 0) > 0.1:
        tail.append(
            f"requests were sent late, p99 {seconds_text(receipt.waited_s.p99)}: {trace.concurrency} were under way; the stated "
            "rate was not held"
        )
    if not receipt.streamed and receipt.all_kinds.requests > failed:
        tail.append("answers came at once, not streamed: first-token times are those of the whole answer")
    tail += [f"FAILED {count}: {error}" for error, count in receipt.errors.items()]
    return Group(Text("\n".join(head)), table, Text("\n".join(tail)))


def _counted(receipt: ServerLoadReceipt) -> str:
    if receipt.tokens_counted == "usage":
        return "the server's count"
    return "pieces of text, as the server gave no count"


def _pair(values: Spread, factor: float) -> str:
    """Median and 99th percentile, three digits each."""
    if values.p50 is None or values.p99 is None:
        return "-"
    return " / ".join(f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in (factor * values.p50, factor * values.p99))
