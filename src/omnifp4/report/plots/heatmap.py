"""A grid of values as shades: layers across, components or experts down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from omnifp4.report.drawing import Drawing, shortened, text_width
from omnifp4.report.figures import figure

SHADES: Final = 9
"""Classes ``shade0`` to ``shade8``; the style sheet colours them from calm to hot."""
FAR: Final = 1e-4
"""Below this share of the largest value everything has the calmest shade."""
HOT: Final = 5
"""From this shade on, text in a cell has the colour of the paper."""
LEAST_FOR_FIGURES: Final = 58.0
LEAST_HEIGHT: Final = 18.0
"""Px of a cell that can hold its value."""
LEGEND: Final = 58.0
FOOT: Final = 34.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Values by row and column; None where there is nothing, or nothing was measured.

    Attributes:
        counts: values are whole numbers.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    title: str
    unit: str
    row_axis: str
    column_axis: str
    counts: bool = False

    def told(self, value: float) -> str:
        """A value in words."""
        return f"{value:,.0f}" if self.counts else figure(value)


def heatmap_plot(grid: Grid, *, key: str, width: float) -> Drawing:
    """Shades are even steps of the logarithm where values span more than a factor of ten, and of the value elsewhere."""
    few_rows = len(grid.rows) <= 24
    labels = max((text_width(name) for name in grid.rows), default=0.0) + 10 if few_rows else 34.0
    left = min(labels, 0.42 * width)
    cell = (width - left) / max(len(grid.columns), 1)
    tall = min(max(cell, 14.0), 24.0) if few_rows else min(max(cell, 3.0), 8.0)
    shown = [v for row in grid.values for v in row if v is not None and math.isfinite(v)]
    bottom = LEGEND + tall * len(grid.rows)
    drawing = Drawing(key, width, bottom + FOOT, title=grid.title, description=_told(grid))
    low, high = _ends(shown)
    _legend(drawing, grid, low, high, least=min(shown, default=0.0))
    shades: dict[str, list[str]] = {}
    gap = 1.0 if cell > 6 and tall > 6 else 0.0
    for number, row in enumerate(grid.values):
        for place, value in enumerate(row):
            if value is None:
                continue
            name = f"shade{_shade(value, low, high)}" if math.isfinite(value) else "broken"
            x, y = left + place * cell, LEGEND + number * tall
            shades.setdefault(name, []).append(f"M{x:.1f} {y:.1f}h{cell - gap:.2f}v{tall - gap:.1f}h-{cell - gap:.2f}z")
    for name in sorted(shades):
        drawing.path("".join(shades[name]), name)
    if cell >= LEAST_FOR_FIGURES and tall >= LEAST_HEIGHT:
        _figures(drawing, grid, (low, high), left, cell, tall)
    every = 1 if few_rows else max(1, math.ceil(14 / tall))
    every = _round_interval(every)
    for number, name in enumerate(grid.rows):
        if number % every == 0:
            drawing.text(left - 8, LEGEND + (number + 0.5) * tall + 4, shortened(name, left - 8), "tick", anchor="end")
    most = max(1, int((width - left) / (max((text_width(n) for n in grid.columns), default=7.0) + 8)))
    every = _round_interval(math.ceil(len(grid.columns) / most))
    for number, name in enumerate(grid.columns):
        if number % every == 0:
            drawing.text(left + (number + 0.5) * cell, bottom + 15, name, "tick", anchor="middle")
    drawing.text((left + width) / 2, bottom + 31, grid.column_axis, "tick", anchor="middle")
    if all(name.isdigit() for name in grid.rows):
        drawing.text(0, LEGEND - 7, grid.row_axis, "tick")
    return drawing


def _figures(drawing: Drawing, grid: Grid, ends: tuple[float, float], left: float, cell: float, tall: float) -> None:
    """The value in each cell, where cells are large enough."""
    for number, row in enumerate(grid.values):
        for place, value in enumerate(row):
            if value is not None and math.isfinite(value):
                name = "on-hot" if _shade(value, *ends) >= HOT else "on-calm"
                x, y = left + (place + 0.5) * cell, LEGEND + (number + 0.5) * tall + 4
                drawing.text(x, y, grid.told(value), name, anchor="middle")


def _round_interval(least: int) -> int:
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 1_000_000) if step >= least)


def _shade(value: float, low: float, high: float) -> int:
    if _decades(low, high):
        share = math.log(max(value, low) / low) / math.log(high / low)
    else:
        share = (value - low) / (high - low) if high > low else 0.0
    return min(int(share * SHADES), SHADES - 1)


def _decades(low: float, high: float) -> bool:
    return low > 0 and high > 10 * low


def _ends(shown: list[float]) -> tuple[float, float]:
    """Between which the shades lie; what is far below the largest is as calm as can be."""
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return (max(low, FAR * high) if low > 0 else low, high)


def _legend(drawing: Drawing, grid: Grid, low: float, high: float, *, least: float) -> None:
    for shade in range(SHADES):
        drawing.rect(shade * 16, 4, 16, 12, f"shade{shade}")
    told = f"{grid.told(low)}{' or less' if least < low else ''} to {grid.told(high)}"
    told += ", log steps" if _decades(low, high) else ""
    drawing.text(SHADES * 16 + 8, 14, told, "tick")
    drawing.text(0, 31, shortened(grid.unit, drawing.width), "tick")


def _told(grid: Grid) -> str:
    found = [
        (value, name, column)
        for name, row in zip(grid.rows, grid.values, strict=True)
        for column, value in zip(grid.columns, row, strict=True)
        if value is not None and math.isfinite(value)
    ]
    if not found:
        return "Nothing was measured."
    worst = sorted(found, reverse=True)[:3]
    return f"{len(found)} cells, {grid.unit}. Largest: " + "; ".join(
        f"{name}, {grid.column_axis} {column}: {grid.told(value)}" for value, name, column in worst
    )
