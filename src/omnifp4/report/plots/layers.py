"""Relative squared error over the depth of the model, one strip per kind of linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omnifp4.report.drawing import Drawing
from omnifp4.report.figures import figure
from omnifp4.report.scales import Scale, round_step

STRIP = 84.0
HEAD = 34.0
FOOT = 34.0


@dataclass(frozen=True, slots=True)
class LayerPoint:
    """The linears of one layer: their median error and the range it lies in."""

    layer: int
    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LayerStrip:
    """One kind of linear, such as ``thinker experts``."""

    name: str
    points: tuple[LayerPoint, ...]


def layers_plot(strips: Sequence[LayerStrip], *, key: str, width: float) -> Drawing:
    """Strips below each other with one error axis, which need not begin at 0: dots, not bars."""
    points = [point for strip in strips for point in strip.points]
    worst = max(points, key=lambda point: point.high)
    where = next(strip.name for strip in strips if worst in strip.points)
    drawing = Drawing(
        key,
        width,
        len(strips) * (STRIP + HEAD) + FOOT,
        title="Relative squared error of the weights by layer",
        description=f"Largest in {where}, layer {worst.layer}: {figure(worst.high)}. "
        + "; ".join(
            f"{strip.name}: medians from {figure(min(p.median for p in strip.points))} "
            f"to {figure(max(p.median for p in strip.points))}"
            for strip in strips
        ),
    )
    left = 52.0
    low, high = min(point.low for point in points), max(point.high for point in points)
    step = 2 * round_step(max(high - low, 0.02 * high, 1e-12) / 4)
    low, high = max(0.0, (low // step) * step), (high // step + 1) * step
    across = Scale(min(p.layer for p in points) - 0.5, max(p.layer for p in points) + 0.5, left, width - 6)
    for number, strip in enumerate(strips):
        top = number * (STRIP + HEAD) + HEAD
        up = Scale(low, high, top + STRIP, top)
        drawing.text(0, top - 11, strip.name, "label")
        for tick in (low, (low + high) / 2, high):
            drawing.line(left, up.at(tick), width, up.at(tick), "grid")
            drawing.text(left - 8, up.at(tick) + 4, f"{tick:.3g}", "tick", anchor="end")
        for point in strip.points:
            x = across.at(point.layer)
            drawing.line(x, up.at(point.low), x, up.at(point.high), "whisker")
            drawing.circle(x, up.at(point.median), 3.2 if len(strip.points) < 60 else 2.2, "after")
    foot = len(strips) * (STRIP + HEAD)
    for tick in across.ticks(10 if width > 500 else 6):
        if tick == int(tick):
            drawing.text(across.at(tick), foot + 16, str(int(tick)), "tick", anchor="middle")
    drawing.text((left + width) / 2, foot + 31, "layer", "tick", anchor="middle")
    return drawing
