"""Where FP4 hurts: by component, layer and expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.receipt.sensitivity import SensitivityReceipt, SensitivityRow
from omnifp4.report.drawing import Drawing
from omnifp4.report.figures import count_text, figure
from omnifp4.report.plots.divergence import DivergenceRow, divergence_plot
from omnifp4.report.plots.heatmap import Grid, heatmap_plot
from omnifp4.report.sections.base import Figure, Section, Table, percent
from omnifp4.report.sections.quality import interval

TITLE = "Where FP4 hurts"
MOST_ROWS: Final = 20


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
        _table("Components, each quantized alone", components, folded=False),
        _table("Layers, each quantized alone", layers, folded=True),
        _table("Experts", experts, folded=True),
    ]
    notes = [
        f"{found.samples:,} samples of {found.data}, {found.positions:,} positions, {found.dtype} on {found.device}, "
        f"recipe {found.recipe}, scale rule {found.rule}. Output error is sum((y - y')²) / sum(y²) of each linear's "
        "outputs on its own inputs of the BF16 run; KL is of the whole model with only this part in FP4.",
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
        result.append(_expert_grid(component, [row for row in found.rows if row.component == component]))
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


def _expert_grid(component: str, rows: Sequence[SensitivityRow]) -> Grid:
    values = {(row.layer, row.expert): row.output_error for row in rows if row.expert is not None}
    layers = sorted({layer for layer, _ in values if layer is not None})
    experts = sorted({expert for _, expert in values if expert is not None})
    return Grid(
        rows=tuple(map(str, layers)),
        columns=tuple(map(str, experts)),
        values=tuple(tuple(values.get((layer, expert)) for expert in experts) for layer in layers),
        title=f"Output error of each expert of {component}; no cell where no token was routed",
        unit="relative squared error of outputs",
        row_axis="layer",
        column_axis="expert",
    )


def _alone_figure(found: SensitivityReceipt, components: Sequence[SensitivityRow]) -> tuple[Figure, ...]:
    measured = [row for row in components if row.kl_mean]
    if not measured:
        return ()
    rows = [
        DivergenceRow(row.component, row.kl_mean.value, row.kl_mean.low, row.kl_mean.high, found.noise_floor)
        for row in sorted(measured, key=lambda row: -row.kl_mean.value if row.kl_mean else 0.0)
        if row.kl_mean
    ]
    if found.together:
        both = found.together
        rows.append(DivergenceRow("all of them", both.value, both.low, both.high, found.noise_floor))
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


def _table(caption: str, rows: Sequence[SensitivityRow], *, folded: bool) -> Table:
    ordered = sorted(rows, key=lambda row: (-(row.kl_mean.value if row.kl_mean else 0.0), -(row.output_error or 0.0)))
    if len(ordered) > MOST_ROWS:
        caption += f", the worst {MOST_ROWS} of {len(ordered):,}"
    with_kl = any(row.kl_mean for row in rows)
    columns = ("part", "linears", "parameters", "weight error", "output error", "tokens")
    return Table(
        caption,
        (*columns, "KL alone (95\u00a0%)", "share") if with_kl else columns,
        tuple(
            (
                _name(row),
                f"{row.linears:,}",
                count_text(row.parameters),
                figure(row.weight_error),
                figure(row.output_error) if row.output_error is not None else "no token",
                f"{row.tokens:,}" if row.tokens is not None else "",
                *((interval(row.kl_mean) if row.kl_mean else "not measured", percent(row.share)) if with_kl else ()),
            )
            for row in ordered[:MOST_ROWS]
        ),
        numeric=frozenset(range(1, 8 if with_kl else 6)),
        folded=folded,
        brief=(0, 3, 4, 6, 7) if with_kl else (),
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
