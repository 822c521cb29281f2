"""A measured distance with its confidence interval beside its noise floor, by group, on an axis of decades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from omnifp4.report.drawing import Drawing, shortened, text_width
from omnifp4.report.figures import figure
from omnifp4.report.scales import Scale, log_range, tick_text

ROW = 30.0
FOOT = 40.0
LEGEND = 28.0


@dataclass(frozen=True, slots=True)
class DivergenceRow:
    """One group: the value, the ends of its interval, and the value that no change at all would give.

    Attributes:
        low: lower end of the confidence interval; None if there is none.
        high: upper end.
        floor: noise floor; None if it was not measured.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None


def divergence_plot(rows: Sequence[DivergenceRow], *, key: str, width: float, title: str, axis: str) -> Drawing:
    """Dots with whiskers; the stretch below the noise floor is shaded."""
    narrow = width < 500
    left = 0.0 if narrow else min(max((text_width(row.name) for row in rows), default=0.0) + 14, 240)
    right = 8.0 if narrow else 66.0
    step = ROW + (16 if narrow else 0)
    numbers = [v for row in rows for v in (row.value, row.low, row.high, row.floor) if v is not None]
    low, high = log_range(numbers)
    scale = Scale(low, high, left + 8, width - right, log=True)
    bottom = LEGEND + step * len(rows)
    drawing = Drawing(
        key,
        width,
        bottom + FOOT,
        title=title,
        description="; ".join(_told(row) for row in rows) + ".",
    )
    _legend(drawing, rows)
    for tick in scale.ticks(6 if narrow else 9):
        drawing.line(scale.at(tick), LEGEND, scale.at(tick), bottom, "grid")
        drawing.text(scale.at(tick), bottom + 16, tick_text(tick, log=True), "tick", anchor="middle")
    drawing.text((left + width) / 2, bottom + 34, shortened(axis, width), "tick", anchor="middle")
    for number, row in enumerate(rows):
        top = LEGEND + number * step
        middle = top + step - ROW / 2
        if narrow:
            drawing.text(0, top + 14, shortened(row.name, width - 74), "label")
            drawing.text(width, top + 14, figure(row.value), "value", anchor="end")
        else:
            drawing.text(left - 8, middle + 4, shortened(row.name, left - 8), "label", anchor="end")
            drawing.text(width, middle + 4, figure(row.value), "value", anchor="end")
        if row.floor is not None and math.isfinite(row.floor):
            drawing.rect(left + 8, middle - 9, scale.at(row.floor) - left - 8, 18, "floor")
            drawing.line(scale.at(row.floor), middle - 9, scale.at(row.floor), middle + 9, "floor-edge")
        if not math.isfinite(row.value):
            continue
        if row.low is not None and row.high is not None:
            drawing.line(scale.at(row.low), middle, scale.at(row.high), middle, "interval")
            for end in (row.low, row.high):
                drawing.line(scale.at(end), middle - 5, scale.at(end), middle + 5, "interval")
        drawing.circle(scale.at(row.value), middle, 4.5, "after")
    return drawing


def _legend(drawing: Drawing, rows: Sequence[DivergenceRow]) -> None:
    drawing.circle(6, 10, 4.5, "after")
    drawing.text(17, 14, "measured")
    x = 100.0
    if any(row.low is not None for row in rows):
        drawing.line(x, 10, x + 20, 10, "interval")
        for end in (x, x + 20):
            drawing.line(end, 5, end, 15, "interval")
        drawing.text(x + 27, 14, "95\u00a0% interval")
        x += 127
    if any(row.floor is not None for row in rows):
        drawing.rect(x, 2, 18, 16, "floor")
        drawing.line(x + 18, 2, x + 18, 18, "floor-edge")
        drawing.text(x + 26, 14, "noise floor")


def _told(row: DivergenceRow) -> str:
    interval = ""
    if row.low is not None and row.high is not None:
        interval = f", interval {figure(row.low)} to {figure(row.high)}"
    floor = f", noise floor {figure(row.floor)}" if row.floor is not None else ""
    return f"{row.name} {figure(row.value)}{interval}{floor}"
