"""Speed and memory beside what the hardware allows, and beside the reference."""

from __future__ import annotations

from omnifp4.receipt.base import Verdict
from omnifp4.receipt.bench import BenchReceipt, DecodeRow, Measured
from omnifp4.receipt.bench import Spread as Repeats
from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.receipt.server_load import Spread as Requests
from omnifp4.report.figures import figure, size_text
from omnifp4.report.gathering import folder_name
from omnifp4.report.plots.roofline import RooflineRow, roofline_plot
from omnifp4.report.sections.base import TO, Figure, KeyFigure, Section, Table, percent

TITLE = "Speed"
COMMAND = "omnifp4 bench OUT --receipt bench.json"


def speed_section(receipt: GatheredReceipt) -> Section:
    """Every bench and load test of a server."""
    benches = receipt.benches
    if not benches and not receipt.server_loads:
        return Section("speed", TITLE, missing=COMMAND)
    sides = [(bench, side) for bench in benches for side in (bench.model, bench.against) if side is not None]
    named = [(side_name(side), side) for _, side in sides]
    weights = [_weights(side) for _, side in named]
    rows = [
        RooflineRow(
            f"{_weights(side) if weights.count(_weights(side)) == 1 else name}, {_cell(row)}",
            row.fraction,
            f"{figure(row.tokens_per_second.median)} of {figure(row.bound_tokens_per_second)} tokens/s",
        )
        for name, side in named
        for row in side.decode
        if row.fraction is not None and row.tokens_per_second is not None
    ]
    figures: tuple[Figure, ...] = ()
    if rows:
        caption = (
            "Decoding as a share of the bound that memory bandwidth sets: the copy bandwidth measured in the same run over "
            "the bytes that a step must move."
        )
        figures = (Figure(caption, lambda key, width: roofline_plot(rows, key=key, width=width)),)
    tables = (
        _decode_table(named),
        _prefill_table(named),
        _memory_table(named),
        _ratio_table(benches),
        _speech_table(named),
        _tier_table(named),
        _check_table(named),
        _server_table(receipt),
    )
    return Section(
        "speed",
        TITLE,
        _lead(receipt),
        figures,
        tuple(table for table in tables if table.rows),
        tuple(_notes(benches)),
    )


def speed_figure(receipt: GatheredReceipt) -> KeyFigure:
    """Decoding of one sequence."""
    row = _single(receipt.benches[0].model) if receipt.benches else None
    if row is None or row.tokens_per_second is None:
        return KeyFigure("decoding, one sequence", "not measured", "omnifp4 bench", "none")
    share = f", {percent(row.fraction)} of the bound" if row.fraction is not None else ""
    note = f"on {receipt.benches[0].machine.device}{share}"
    return KeyFigure("decoding, one sequence", f"{figure(row.tokens_per_second.median)} tokens/s", note)


def side_name(side: Measured) -> str:
    """Folder or shape, and what its weights are."""
    return f"{folder_name(side.model)} {_weights(side)}"


def _weights(side: Measured) -> str:
    """``NVFP4`` or ``BF16``, without what of it."""
    return side.weights.partition(":")[0]


def _single(side: Measured) -> DecodeRow | None:
    rows = [row for row in side.decode if row.batch == 1 and row.tokens_per_second is not None]
    return min(rows, key=lambda row: row.prompt_tokens) if rows else None


def _lead(receipt: GatheredReceipt) -> str:
    if not receipt.benches:
        return "Only a server was measured."
    bench = receipt.benches[0]
    if not bench.passed:
        return "A check failed before the measurement, so no speed was measured."
    row = _single(bench.model)
    if row is None or row.tokens_per_second is None:
        return f"No decoding of a single sequence was measured on {bench.machine.device}."
    told = f"One sequence is decoded at {_repeats(row.tokens_per_second)} tokens/s on {bench.machine.device}"
    if row.fraction is not None:
        told += f": {percent(row.fraction)} of the bound of {figure(row.bound_tokens_per_second)} tokens/s"
    return told + "."


def _notes(benches: tuple[BenchReceipt, ...]) -> list[str]:
    notes = []
    for bench in benches:
        machine = bench.machine
        copy = machine.copy_bytes_per_second
        triton = f", Triton {machine.triton}" if machine.triton else ""
        notes.append(
            f"{machine.device}, {machine.cores} cores, {size_text(machine.device_bytes)} of memory; copy bandwidth "
            f"{size_text(round(copy.median))}/s read and written; torch {machine.torch}, transformers "
            f"{machine.transformers}{triton}; medians of {bench.settings.repeats} repeats, least and most behind them"
        )
        notes += [
            f"{side_name(side)}: {side.weights}; engine {side.engine}: {side.engine_reason}"
            for side in (bench.model, bench.against)
            if side is not None
        ]
    return notes


def _cell(row: DecodeRow) -> str:
    return f"batch {row.batch:,}, {row.prompt_tokens:,} tokens"


def _decode_table(named: list[tuple[str, Measured]]) -> Table:
    return Table(
        "Decoding",
        ("model", "batch", "prompt", "tokens/s, all sequences", "bound", "share of the bound", "bytes a step"),
        tuple(
            (
                name,
                f"{row.batch:,}",
                f"{row.prompt_tokens:,}",
                _repeats(row.tokens_per_second) if row.tokens_per_second else f"not measured: {row.not_measured}",
                figure(row.bound_tokens_per_second),
                percent(row.fraction),
                size_text(row.step_bytes),
            )
            for name, side in named
            for row in side.decode
        ),
        numeric=frozenset(range(1, 7)),
        brief=(0, 1, 2, 3, 5),
    )


def _prefill_table(named: list[tuple[str, Measured]]) -> Table:
    return Table(
        "Prefill",
        ("model", "prompt", "time to first token", "tokens/s"),
        tuple(
            (
                name,
                f"{row.prompt_tokens:,}",
                f"{_repeats(row.first_token_seconds, 1e3)} ms" if row.first_token_seconds else "not measured",
                _repeats(row.tokens_per_second) if row.tokens_per_second else f"not measured: {row.not_measured}",
            )
            for name, side in named
            for row in side.prefill
        ),
        numeric=frozenset({1, 2, 3}),
    )


def _memory_table(named: list[tuple[str, Measured]]) -> Table:
    return Table(
        "Memory of the device and loading",
        ("model", "weights", "most while measured", "most while loading", "seconds to load"),
        tuple(
            (
                name,
                size_text(side.memory.weight_bytes),
                size_text(side.memory.peak_bytes) if side.memory.peak_bytes is not None else "not measured",
                size_text(side.memory.loading_peak_bytes)
                if side.memory.loading_peak_bytes is not None
                else "not measured",
                figure(side.load_seconds) if side.load_seconds is not None else "not loaded from files",
            )
            for name, side in named
        ),
        numeric=frozenset({1, 2, 3, 4}),
    )


def _ratio_table(benches: tuple[BenchReceipt, ...]) -> Table:
    return Table(
        "The model over its reference; above 1 is better",
        ("figure", "model", "reference", "ratio"),
        tuple(
            (row.figure, figure(row.model), figure(row.reference), f"{row.ratio:.2f}x")
            for bench in benches
            for row in bench.ratios
        ),
        numeric=frozenset({1, 2, 3}),
        brief=(0, 1, 2, 3),
    )


def _speech_table(named: list[tuple[str, Measured]]) -> Table:
    return Table(
        "Speech",
        ("model", "seconds of work for one of sound", "text to first sound", "sound made", "how"),
        tuple(
            (
                name,
                _repeats(side.speech.real_time_factor) if side.speech.real_time_factor else "not measured",
                f"{_repeats(side.speech.first_sound_seconds)} s" if side.speech.first_sound_seconds else "not measured",
                f"{figure(side.speech.audio_seconds)} s",
                side.speech.not_measured or side.speech.how,
            )
            for name, side in named
            if side.speech is not None
        ),
        numeric=frozenset({1, 2, 3}),
    )


def _tier_table(named: list[tuple[str, Measured]]) -> Table:
    tiers = [(name, tier) for name, side in named for tier in side.tiers]
    return Table(
        "Tiers",
        ("tier", "model", "weights", "limit", "tokens/s", "at least", "verdict", "why"),
        tuple(
            (
                tier.name,
                name,
                f"{tier.gib:.2f} GiB",
                f"{tier.most_gib:g} GiB",
                figure(tier.tokens_per_second) if tier.tokens_per_second is not None else "not measured",
                f"{tier.least_tokens_per_second:g}",
                tier.verdict.value,
                tier.reason,
            )
            for name, tier in tiers
        ),
        numeric=frozenset({2, 3, 4, 5}),
        states=tuple(tier.verdict.value for _, tier in tiers),
        brief=(0, 1, 6),
    )


def _check_table(named: list[tuple[str, Measured]]) -> Table:
    checks = [(name, check) for name, side in named for check in side.checks]
    return Table(
        "What was checked before it was measured",
        ("check", "model", "verdict", "what was found"),
        tuple(
            (check.name, name, check.verdict.value, "; ".join((check.summary, *check.findings[:3])))
            for name, check in checks
        ),
        states=tuple(check.verdict.value for _, check in checks),
        folded=all(check.verdict is Verdict.PASS for _, check in checks),
    )


def _server_table(receipt: GatheredReceipt) -> Table:
    return Table(
        "Load on a server",
        (
            "server",
            "requests",
            "failed",
            "at once",
            "requests/s",
            "output tokens/s",
            "first token, p50 / p99",
            "whole answer, p50 / p99",
            "speech, p50",
        ),
        tuple(
            (
                f"{load.engine or load.server} {load.model}",
                f"{load.all_kinds.requests:,}",
                f"{load.all_kinds.failed:,}",
                f"{load.trace.concurrency:,}",
                figure(load.requests_per_s),
                figure(load.output_tokens_per_s),
                _requests(load.all_kinds.ttft_s),
                _requests(load.all_kinds.end_to_end_s),
                f"{figure(rtf)} s a second" if (rtf := load.all_kinds.speech_rtf.p50) is not None else "none",
            )
            for load in receipt.server_loads
        ),
        numeric=frozenset(range(1, 9)),
        brief=(0, 1, 2, 5, 6),
    )


def _repeats(spread: Repeats, factor: float = 1.0) -> str:
    """Median with the least and the most, such as ``61.2 (60.8 to 61.9)``."""
    median, least, most = (figure(factor * value) for value in (spread.median, spread.least, spread.most))
    return f"{median} ({least}{TO}{most})" if spread.repeats > 1 else median


def _requests(spread: Requests) -> str:
    if spread.p50 is None or spread.p99 is None:
        return "none"
    return f"{figure(spread.p50)} / {figure(spread.p99)} s"
