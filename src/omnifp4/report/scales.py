"""Axes: from values to px, and where their ticks stand."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps `low`..`high` to `start`..`end` px, linearly or by decades."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The px of a value; what lies outside is put on the edge."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """At most about `most` round values inside."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last - first < 2:
                inside = [digit * 10.0**power for power in range(first - 1, last + 1) for digit in (1, 2, 5)]
                return [tick for tick in inside if self.low <= tick * (1 + 1e-9) and tick <= self.high * (1 + 1e-9)]
            every = max(1, math.ceil((last - first + 1) / most))
            return [10.0**power for power in range(first, last + 1, every)]
        step = round_step((self.high - self.low) / max(most, 1))
        numbers = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [number * step for number in numbers]


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `rough`."""
    if not rough > 0 or not math.isfinite(rough):
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= rough * (1 - 1e-9))


def log_range(values: list[float]) -> tuple[float, float]:
    """Whole decades that hold all positive `values`; one decade if there is none."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive:
        return 0.1, 1.0
    low = 10.0 ** math.floor(math.log10(min(positive)))
    high = 10.0 ** math.ceil(math.log10(max(positive)))
    return (low, high) if high > low else (low, low * 10.0)


def tick_text(value: float, *, log: bool = False) -> str:
    """A tick's label."""
    if log and not 1e-3 <= value < 1e4:
        return f"1e{round(math.log10(value))}"
    return f"{value:.3g}"
