"""A measured distance with its confidence interval beside its noise floor, on an axis of decades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from omnifp4.report.drawing import Drawing, shortened
from omnifp4.report.figures import figure
from omnifp4.report.plots.rows import Row, layout, legend, whiskers
from omnifp4.report.scales import Scale, log_range, tick_text

FOOT: Final = 40.0
LEGEND: Final = 28.0
VALUE: Final = 66.0
"""Px to the right of the axis for the value."""
FAR: Final = 1e-3
"""A noise floor below this share of the least value would leave the picture to empty decades."""


def divergence_plot(rows: Sequence[Row], *, key: str, width: float, title: str, axis: str) -> Drawing:
    """Dots with whiskers; the stretch below the noise floor is shaded, where it is not far below everything else."""
    description = "; ".join(row.told() for row in rows) + "."
    rows = _near(rows)
    placed = layout(rows, width, LEGEND)
    low, high = log_range([number for row in rows for number in row.numbers])
    scale = Scale(low, high, placed.left + 8, width - (8.0 if placed.narrow else VALUE), log=True)
    drawing = Drawing(key, width, placed.bottom + FOOT, title=title, description=description)
    legend(drawing, rows)
    for tick in scale.ticks(6 if placed.narrow else 9):
        drawing.line(scale.at(tick), LEGEND, scale.at(tick), placed.bottom, "grid")
        drawing.text(scale.at(tick), placed.bottom + 16, tick_text(tick, log=True), "tick", anchor="middle")
    drawing.text((placed.left + width) / 2, placed.bottom + 34, shortened(axis, width), "tick", anchor="middle")
    placed.names(drawing, rows, [figure(row.value) for row in rows])
    for row, middle in zip(rows, placed.middles, strict=True):
        if row.floor is not None and math.isfinite(row.floor):
            edge = scale.at(row.floor)
            drawing.rect(placed.left + 8, middle - 9, edge - placed.left - 8, 18, "floor")
            drawing.line(edge, middle - 9, edge, middle + 9, "floor-edge")
        if not math.isfinite(row.value):
            continue
        if row.low is not None and row.high is not None:
            whiskers(drawing, scale.at(row.low), scale.at(row.high), middle)
        drawing.circle(scale.at(row.value), middle, 4.5, "after")
    return drawing


def _near(rows: Sequence[Row]) -> list[Row]:
    """Rows without the floors that are far below."""
    values = [number for row in rows for number in (row.value, row.low) if number is not None and number > 0]
    least = FAR * min(values, default=0.0)
    return [replace(row, floor=None) if row.floor is not None and row.floor < least else row for row in rows]
