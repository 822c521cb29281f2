"""Where the rows of a picture stand, one below the other, those of a group under its heading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from omnifp4.report.drawing import Drawing, shortened, text_width
from omnifp4.report.figures import figure

ROW: Final = 30.0
GROUPED: Final = 23.0
"""Rows under a heading stand closer: they are read together."""
HEADING: Final = 30.0
MOST_LABEL: Final = 240.0
BOLD: Final = 1.12
"""Headings are so much wider than other text."""
NARROW: Final = 500.0
"""Px; below it a row's name stands above the row."""


@dataclass(frozen=True, slots=True)
class Row:
    """One value with what surrounds it.

    Attributes:
        name: of the row.
        value: where the dot stands.
        low: lower end of the confidence interval; None if there is none.
        high: upper end.
        floor: noise floor; None if it was not measured.
        group: heading that it stands under; empty for none.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    group: str = ""

    @property
    def numbers(self) -> list[float]:
        """All that must find room on the axis."""
        return [value for value in (self.value, self.low, self.high, self.floor) if value is not None]

    def told(self, show: str = "") -> str:
        """For those who do not see it; `show` in place of the value."""
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f", interval {figure(self.low)} to {figure(self.high)}"
        floor = f", noise floor {figure(self.floor)}" if self.floor is not None else ""
        place = f"{self.group}, {self.name}" if self.group else self.name
        return f"{place} {show or figure(self.value)}{interval}{floor}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Of rows in a picture of some width.

    Attributes:
        left: px where the axis may begin.
        middles: of each row, px.
        headings: px of the base line, and text.
        bottom: px below the last row.
    """

    narrow: bool
    width: float
    left: float
    middles: tuple[float, ...]
    headings: tuple[tuple[float, str], ...]
    bottom: float

    def names(self, drawing: Drawing, rows: Sequence[Row], values: Sequence[str]) -> None:
        """Headings, names to the left, values to the right."""
        for baseline, text in self.headings:
            drawing.text(0, baseline, shortened(text, self.width / BOLD), "heading")
        for row, value, middle in zip(rows, values, self.middles, strict=True):
            if self.narrow:
                drawing.text(0, middle - ROW / 2 + 1, shortened(row.name, self.width - 80), "label")
                drawing.text(self.width, middle - ROW / 2 + 1, value, "value", anchor="end")
            else:
                drawing.text(self.left - 8, middle + 4, shortened(row.name, self.left - 8), "label", anchor="end")
                drawing.text(self.width, middle + 4, value, "value", anchor="end")


def layout(rows: Sequence[Row], width: float, top: float) -> Layout:
    """Place `rows` below `top`; a heading stands wherever the group changes."""
    narrow = width < NARROW
    grouped = any(row.group for row in rows)
    step = (GROUPED if grouped and not narrow else ROW) + (16 if narrow else 0)
    left = 0.0 if narrow else min(max((text_width(row.name) for row in rows), default=0.0) + 14, MOST_LABEL)
    y, before = top, ""
    middles: list[float] = []
    headings: list[tuple[float, str]] = []
    for row in rows:
        if row.group != before:
            y += HEADING
            headings.append((y - 9, row.group))
            before = row.group
        y += step
        middles.append(y - (ROW if narrow else step) / 2)
    return Layout(narrow, width, left, tuple(middles), tuple(headings), y)


def legend(drawing: Drawing, rows: Sequence[Row]) -> None:
    """Dot, whiskers and noise floor, as far as `rows` have them, above the picture."""
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


def whiskers(drawing: Drawing, low: float, high: float, middle: float) -> None:
    """An interval from `low` to `high` px."""
    drawing.line(low, middle, high, middle, "interval")
    for end in (low, high):
        drawing.line(end, middle - 5, end, middle + 5, "interval")
