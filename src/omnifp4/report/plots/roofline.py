"""What was reached of what the hardware allows, as bars that end at 100 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omnifp4.report.drawing import Drawing, shortened, text_width
from omnifp4.report.scales import Scale

ROW = 26.0
FOOT = 36.0


@dataclass(frozen=True, slots=True)
class RooflineRow:
    """One measurement.

    Attributes:
        reached: share of the limit, 1.0 is the limit itself.
        told: value and limit with their units.
    """

    name: str
    reached: float
    told: str


def roofline_plot(rows: Sequence[RooflineRow], *, key: str, width: float) -> Drawing:
    """Bars on an axis that reaches at least to the limit."""
    narrow = width < 560
    left = 10.0 if narrow else min(max((text_width(row.name) for row in rows), default=0.0) + 12, 0.4 * width)
    right = 46.0
    step = ROW + (18 if narrow else 10)
    scale = Scale(0, max(1.0, *(row.reached for row in rows)), left, width - right)
    bottom = step * len(rows) + 6
    drawing = Drawing(
        key,
        width,
        bottom + FOOT,
        title="Speed as a share of what the hardware allows",
        description="; ".join(f"{row.name}: {row.reached:.1%}, {row.told}" for row in rows) + ".",
    )
    for tick in scale.ticks(4 if narrow else 5):
        drawing.line(scale.at(tick), 0, scale.at(tick), bottom, "grid")
        drawing.text(scale.at(tick), bottom + 16, f"{tick:.0%}", "tick", anchor="middle")
    drawing.line(scale.at(1), 0, scale.at(1), bottom, "limit")
    drawing.text((left + width) / 2, bottom + 33, "share of the limit", "tick", anchor="middle")
    for number, row in enumerate(rows):
        top = number * step + 6
        if narrow:
            drawing.text(0, top + 12, shortened(row.name, width), "label")
            top += 18
        else:
            drawing.text(left - 10, top + 14, shortened(row.name, left - 10), "label", anchor="end")
        drawing.rect(left, top + 3, max(scale.at(row.reached) - left, 1), 16, "after", radius=2)
        drawing.text(scale.at(row.reached) + 7, top + 15, f"{row.reached:.1%}", "value")
    return drawing
