"""What a recipe could know of a model's inputs: samples, tokens, and how many of them each expert saw."""

from __future__ import annotations

from collections import Counter
from statistics import median

from omnifp4.receipt.calibration import CalibrationReceipt
from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.gathering import folder_name
from omnifp4.report.plots.heatmap import Grid, heatmap_plot
from omnifp4.report.sections.base import Figure, Section, Table

TITLE = "Calibration"
MOST_EXPERT_GROUPS = 128


def calibration_sections(receipt: GatheredReceipt) -> tuple[Section, ...]:
    """None where no statistics were collected: most recipes look at no data."""
    found = receipt.calibration
    if found is None:
        return ()
    tokens = ", ".join(f"{count:,} {modality}" for modality, count in found.tokens.items())
    went = found.samples - len(found.failures)
    lead = f"{went:,} of {found.samples:,} samples of {folder_name(found.data)} went through; tokens: {tokens}."
    grid = _grid(found)
    figures = (Figure(f"{grid.title}.", lambda key, width: heatmap_plot(grid, key=key, width=width)),) if grid else ()
    tables = tuple(table for table in (_experts(found), _failures(found)) if table.rows)
    notes = [
        f"SHA-256 of the sequences {found.data_sha256[:12]}, {found.dtype} on {found.device}. An expert with fewer than "
        f"{found.least_tokens:,} routed tokens takes what all tokens of its layer would have told it, or else none."
    ]
    notes += [f"{name} has no statistics: {reason}" for name, reason in found.not_captured.items()]
    return (Section("calibration", TITLE, lead, figures, tables, tuple(notes)),)


def _grid(found: CalibrationReceipt) -> Grid | None:
    groups = found.experts[:MOST_EXPERT_GROUPS]
    if not groups:
        return None
    most = max(len(one.tokens) for one in groups)
    return Grid(
        rows=tuple(map(str, range(len(groups)))),
        columns=tuple(map(str, range(most))),
        values=tuple((*map(float, one.tokens), *(None,) * (most - len(one.tokens))) for one in groups),
        title="Tokens that were routed to each expert",
        unit="tokens",
        row_axis="layer",
        column_axis="expert",
        counts=True,
    )


def _experts(found: CalibrationReceipt) -> Table:
    return Table(
        "Tokens of the experts",
        ("layer's experts", "fewest", "median", "most", "never chosen", "too few", "without statistics"),
        tuple(
            (
                one.experts,
                f"{min(one.tokens):,}",
                f"{median(one.tokens):,.0f}",
                f"{max(one.tokens):,}",
                f"{one.tokens.count(0):,}",
                f"{one.too_few:,}",
                f"{one.data_free:,}",
            )
            for one in found.experts
            if one.tokens
        ),
        numeric=frozenset(range(1, 7)),
        folded=len(found.experts) > 8,
        brief=(0, 1, 2, 3, 5),
    )


def _failures(found: CalibrationReceipt) -> Table:
    counts = Counter(failure.cause for failure in found.failures)
    first = {failure.cause: failure for failure in reversed(found.failures)}
    return Table(
        "Samples that failed",
        ("cause", "samples", "first of them", "what was raised"),
        tuple((cause.value, f"{count:,}", first[cause].sample, first[cause].error) for cause, count in counts.items()),
        numeric=frozenset({1}),
        brief=(0, 1),
    )
