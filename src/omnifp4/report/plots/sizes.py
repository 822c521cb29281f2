"""Bytes of each component, before and after, as pairs of bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from omnifp4.report.drawing import Drawing, shortened, text_width
from omnifp4.report.figures import size_text
from omnifp4.report.scales import Scale

SMALL: Final = 0.01
"""Components with less than this share of the bytes are drawn as one."""
BAR: Final = 9.0


@dataclass(frozen=True, slots=True)
class SizeRow:
    """One component: bytes as it was and as it is stored now."""

    name: str
    before: int
    after: int


def merged(rows: Sequence[SizeRow]) -> list[SizeRow]:
    """Largest first, with the small ones as one row at the end."""
    whole = sum(row.before for row in rows)
    ordered = sorted(rows, key=lambda row: -row.before)
    large = [row for row in ordered if row.before >= SMALL * whole]
    small = ordered[len(large) :]
    if len(small) < 2:
        return ordered
    rest = SizeRow(f"{len(small)} smaller ones", sum(r.before for r in small), sum(r.after for r in small))
    return [*large, rest]


def sizes_plot(rows: Sequence[SizeRow], *, key: str, width: float) -> Drawing:
    """The bars; on a narrow picture names stand above them."""
    rows = merged(rows)
    narrow = width < 500
    values = [f"{size_text(row.before)} → {size_text(row.after)}" for row in rows]
    left = 0.0 if narrow else min(max((text_width(row.name) for row in rows), default=0.0) + 12, 190)
    right = max((text_width(value) for value in values), default=0.0) + 10
    step = 2 * BAR + (32 if narrow else 14)
    legend = 26.0
    before, after = sum(row.before for row in rows), sum(row.after for row in rows)
    drawing = Drawing(
        key,
        width,
        legend + step * len(rows),
        title="Bytes of weights by component, before and after",
        description=f"{size_text(before)} before, {size_text(after)} after. "
        + "; ".join(f"{row.name} {value}" for row, value in zip(rows, values, strict=True)),
    )
    drawing.rect(0, 3, 12, 12, "before", radius=2)
    drawing.text(18, 14, "before")
    drawing.rect(78, 3, 12, 12, "after", radius=2)
    drawing.text(96, 14, "after")
    scale = Scale(0, max((max(row.before, row.after) for row in rows), default=1) or 1, 0, width - left - right)
    for number, (row, value) in enumerate(zip(rows, values, strict=True)):
        top = legend + number * step
        if narrow:
            drawing.text(0, top + 11, shortened(row.name, width), "label")
            top += 17
        else:
            drawing.text(left - 10, top + BAR + 5, shortened(row.name, left - 10), "label", anchor="end")
        drawing.rect(left, top, max(scale.at(row.before), 1), BAR, "before", radius=1.5)
        drawing.rect(left, top + BAR + 1, max(scale.at(row.after), 1), BAR, "after", radius=1.5)
        end = max(scale.at(row.before), scale.at(row.after))
        drawing.text(left + end + 8, top + BAR + 5, value, "value")
    return drawing
