"""Points that were won or lost, with their confidence intervals, around a line that means no change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from omnifp4.report.drawing import Drawing, shortened
from omnifp4.report.figures import figure
from omnifp4.report.plots.rows import Row, layout, legend, whiskers
from omnifp4.report.scales import Scale, round_step

FOOT: Final = 40.0
LEGEND: Final = 28.0
VALUE: Final = 56.0
LEAST_POINTS: Final = 2.0
"""The axis reaches at least so far to both sides: half a point must not look like a fall."""


def changes_plot(rows: Sequence[Row], *, key: str, width: float, title: str, axis: str) -> Drawing:
    """Dots with whiskers; what the noise floor changed is shaded from no change on.

    Args:
        rows: values in points; `Row.floor` is the change under the noise floor.
        key: see `Drawing`.
        width: in px.
        title: of the picture.
        axis: what the axis tells.
    """
    placed = layout(rows, width, LEGEND)
    far = max([LEAST_POINTS, *(abs(number) for row in rows for number in row.numbers)])
    step = round_step(2 * far / (5 if placed.narrow else 9))
    reach = step * -(-far // step)
    scale = Scale(-reach, reach, placed.left + 14, width - (14.0 if placed.narrow else VALUE))
    description = "; ".join(row.told(f"{row.value:+.2f}") for row in rows) + "."
    drawing = Drawing(key, width, placed.bottom + FOOT, title=title, description=description)
    legend(drawing, rows)
    for tick in scale.ticks(5 if placed.narrow else 9):
        drawing.line(scale.at(tick), LEGEND, scale.at(tick), placed.bottom, "grid")
        sign = f"{tick:+.3g}" if abs(tick) > step / 2 else "0"
        drawing.text(scale.at(tick), placed.bottom + 16, sign, "tick", anchor="middle")
    drawing.line(scale.at(0), LEGEND, scale.at(0), placed.bottom, "limit")
    drawing.text((placed.left + width) / 2, placed.bottom + 34, shortened(axis, width), "tick", anchor="middle")
    placed.names(drawing, rows, [f"{row.value:+.1f}" if row.value else figure(0) for row in rows])
    for row, middle in zip(rows, placed.middles, strict=True):
        if row.floor:
            ends = sorted((scale.at(0), scale.at(row.floor)))
            drawing.rect(ends[0], middle - 8, ends[1] - ends[0], 16, "floor")
            drawing.line(scale.at(row.floor), middle - 8, scale.at(row.floor), middle + 8, "floor-edge")
        if row.low is not None and row.high is not None and row.low != row.high:
            whiskers(drawing, scale.at(row.low), scale.at(row.high), middle)
        drawing.circle(scale.at(row.value), middle, 4.5, "after")
    return drawing
