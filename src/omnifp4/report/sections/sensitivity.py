"""Where FP4 hurts: by component, layer and expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.receipt.sensitivity import SensitivityReceipt, SensitivityRow
from omnifp4.report.drawing import Drawing
from omnifp4.report.figures import count_text, figure
from omnifp4.report.gathering import folder_name
from omnifp4.report.plots.divergence import divergence_plot
from omnifp4.report.plots.heatmap import Grid, heatmap_plot
from omnifp4.report.plots.rows import Row
from omnifp4.report.sections.base import TO, Figure, Section, Table, percent
from omnifp4.report.sections.quality import interval

TITLE = "Where FP4 hurts"
MOST_ROWS: Final = 64
"""Of a table; the receipt has all."""


def sensitivity_section(receipt: GatheredReceipt) -> Section:
    """The map as pictures and tables."""
    found = receipt.sensitivity
    if found is None:
        return Section(
            "sensitivity",
            TITLE,
            missing="omnifp4 evaluate OUT --against MODEL --sensitivity --receipt sensitivity.json",
        )
    return sensitivity_section_of(found)


def sensitivity_section_of(found: SensitivityReceipt) -> Section:
    """The same of a map that stands alone."""
    components = [row for row in found.rows if row.layer is None]
    layers = [row for row in found.rows if row.layer is not None and row.expert is None]
    experts = [row for row in found.rows if row.expert is not None]
    figures = [
        *_alone_figure(found, components),
        *(Figure(grid.title + ".", _drawn(grid)) for grid in grids(found)),
    ]
    tables = [
        _table("Components, each quantized alone", components, found.noise_floor, folded=False),
        _table("Layers, each quantized alone", layers, found.noise_floor, folded=True),
        _table("Experts", experts, found.noise_floor, folded=True),
    ]
    notes = [
        f"{found.samples:,} samples of {folder_name(found.data)}, {found.positions:,} positions, {found.dtype} on {found.device}, "
        f"recipe {found.recipe}, scale rule {found.rule}. Output error is sum((y - y')²) / sum(y²) of each linear's "
        "outputs on its own inputs of the run before FP4; KL is of the whole model with only this part in FP4, and share "
        "is its part of the sum over all of the same table.",
        *_noise_note(found),
        *found.notes,
    ]
    return Section(
        "sensitivity",
        TITLE,
        _lead(found, components, layers),
        tuple(figures),
        tuple(table for table in tables if table.rows),
        tuple(notes),
    )


def grids(found: SensitivityReceipt) -> tuple[Grid, ...]:
    """The heat maps that the receipt has figures for: KL and output error by layer, output error by expert."""
    layers = [row for row in found.rows if row.layer is not None and row.expert is None]
    result = []
    if any(row.kl_mean for row in layers):
        result.append(
            _grid(
                layers,
                {(row.component, row.layer): row.kl_mean.value for row in layers if row.kl_mean},
                "KL divergence of each layer of each component, quantized alone",
                "mean KL divergence in nats",
            )
        )
    if any(row.output_error is not None for row in layers):
        result.append(
            _grid(
                layers,
                {(row.component, row.layer): row.output_error for row in layers},
                "Output error by component and layer",
                "relative squared error of outputs",
            )
        )
    for component in dict.fromkeys(row.component for row in found.rows if row.expert is not None):
        experts = [row for row in found.rows if row.component == component and row.expert is not None]
        if any(row.kl_mean for row in experts):
            alone = {(row.layer, row.expert): row.kl_mean.value if row.kl_mean else None for row in experts}
            title = f"KL divergence of each expert of {component}, quantized alone"
            result.append(_expert_grid(alone, title, "mean KL divergence in nats"))
        errors = {(row.layer, row.expert): row.output_error for row in experts}
        title = f"Output error of each expert of {component}; no cell where no token was routed"
        result.append(_expert_grid(errors, title, "relative squared error of outputs"))
    return tuple(result)


def _grid(
    rows: Sequence[SensitivityRow], values: dict[tuple[str, int | None], float | None], title: str, unit: str
) -> Grid:
    names = tuple(dict.fromkeys(row.component for row in rows))
    numbers = sorted({row.layer for row in rows if row.layer is not None})
    return Grid(
        rows=names,
        columns=tuple(map(str, numbers)),
        values=tuple(tuple(values.get((name, number)) for number in numbers) for name in names),
        title=title,
        unit=unit,
        row_axis="component",
        column_axis="layer",
    )


def _expert_grid(values: Mapping[tuple[int | None, int | None], float | None], title: str, unit: str) -> Grid:
    layers = sorted({layer for layer, _ in values if layer is not None})
    experts = sorted({expert for _, expert in values if expert is not None})
    return Grid(
        rows=tuple(map(str, layers)),
        columns=tuple(map(str, experts)),
        values=tuple(tuple(values.get((layer, expert)) for expert in experts) for layer in layers),
        title=title,
        unit=unit,
        row_axis="layer",
        column_axis="expert",
    )


def _alone_figure(found: SensitivityReceipt, components: Sequence[SensitivityRow]) -> tuple[Figure, ...]:
    measured = [row for row in components if row.kl_mean]
    if not measured:
        return ()
    rows = [
        Row(row.component, row.kl_mean.value, row.kl_mean.low, row.kl_mean.high, found.noise_floor)
        for row in sorted(measured, key=lambda row: -row.kl_mean.value if row.kl_mean else 0.0)
        if row.kl_mean
    ]
    if found.together:
        both = found.together
        rows.append(Row("all of them", both.value, both.low, both.high, found.noise_floor))
    title = "KL divergence of each component, quantized alone"
    return (
        Figure(
            f"{title}, and of all of them together.",
            lambda key, width: divergence_plot(
                rows, key=key, width=width, title=title, axis="mean KL divergence, nats per token"
            ),
        ),
    )


def _drawn(grid: Grid) -> Callable[[str, float], Drawing]:
    return lambda key, width: heatmap_plot(grid, key=key, width=width)


def _noise_note(found: SensitivityReceipt) -> list[str]:
    """What cannot be told from nothing."""
    alone = [row for row in found.rows if row.kl_mean is not None]
    if found.noise_floor is None or not alone:
        return []
    lost = sum(_in_noise(row, found.noise_floor) for row in alone)
    if not lost:
        return [f"Every part is above the noise floor of {figure(found.noise_floor)}."]
    more = "; --dtype float32 lowers it" if found.dtype != "float32" else ""
    return [
        f"{lost:,} of {len(alone):,} parts cost no more alone than the noise floor of {figure(found.noise_floor)}: "
        f"they are not told apart from no change{more}."
    ]


def _in_noise(row: SensitivityRow, noise_floor: float | None) -> bool:
    return row.kl_mean is not None and noise_floor is not None and row.kl_mean.value <= noise_floor


def _brief(*, with_kl: bool, experts: bool) -> tuple[int, ...]:
    """Columns for a terminal: long names leave no room for the error of the weights, which hardly varies."""
    if not with_kl:
        return (0, 3, 4, 5)
    return (0, 4, 6, 8) if experts else (0, 3, 4, 6, 8)


def _alone(row: SensitivityRow, noise_floor: float | None) -> tuple[str, str, str]:
    """Divergence, its interval, and its share."""
    if (kl := row.kl_mean) is None:
        return "not measured", "", ""
    share = "in the noise" if _in_noise(row, noise_floor) else percent(row.share)
    return figure(kl.value), f"{figure(kl.low)}{TO}{figure(kl.high)}", share


def _table(caption: str, rows: Sequence[SensitivityRow], noise_floor: float | None, *, folded: bool) -> Table:
    ordered = sorted(rows, key=lambda row: (-(row.kl_mean.value if row.kl_mean else 0.0), -(row.output_error or 0.0)))
    if len(ordered) > MOST_ROWS:
        caption += f", the worst {MOST_ROWS} of {len(ordered):,}"
    with_kl = any(row.kl_mean for row in rows)
    columns = ("part", "linears", "parameters", "weight error", "output error", "tokens")
    return Table(
        caption,
        (*columns, "KL alone", "95\u00a0%", "share") if with_kl else columns,
        tuple(
            (
                _name(row),
                f"{row.linears:,}",
                count_text(row.parameters),
                figure(row.weight_error),
                figure(row.output_error) if row.output_error is not None else "no token",
                f"{row.tokens:,}" if row.tokens is not None else "",
                *(_alone(row, noise_floor) if with_kl else ()),
            )
            for row in ordered[:MOST_ROWS]
        ),
        numeric=frozenset(range(1, 9 if with_kl else 6)),
        folded=folded,
        brief=_brief(with_kl=with_kl, experts=any(row.expert is not None for row in rows)),
    )


def _name(row: SensitivityRow) -> str:
    layer = f", layer {row.layer}" if row.layer is not None else ""
    expert = f", expert {row.expert}" if row.expert is not None else ""
    return f"{row.component}{layer}{expert}"


def _lead(found: SensitivityReceipt, components: Sequence[SensitivityRow], layers: Sequence[SensitivityRow]) -> str:
    told = []
    for what, rows in (("component", components), ("layer", layers)):
        measured = [row for row in rows if row.kl_mean is not None]
        if measured:
            worst = max(measured, key=lambda row: row.kl_mean.value if row.kl_mean else 0.0)
            share = f", {percent(worst.share)} of what all cause alone" if worst.share is not None else ""
            assert worst.kl_mean is not None
            told.append(f"The {what} that costs most is {_name(worst)}: KL {interval(worst.kl_mean)}{share}.")
    if found.together:
        told.append(f"All together cost {interval(found.together)}.")
    return " ".join(told) or f"Errors of {len(found.rows):,} parts; their divergence was not measured."
