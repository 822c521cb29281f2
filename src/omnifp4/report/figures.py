"""Bytes, counts and measured numbers as people read them."""

from __future__ import annotations

import math


def size_text(count: int) -> str:
    """Decimal bytes for people, such as ``27.5 GB``."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def count_text(count: int) -> str:
    """A number of parameters for people, such as ``28,991 M``."""
    if count < 10_000:
        return f"{count:,}"
    return f"{count / 1e6:,.0f} M" if count >= 10_000_000 else f"{count / 1e6:,.2f} M"


def figure(value: float) -> str:
    """A measured number with three significant digits: ``0.0123``, ``4.56e-5``, ``1,234``."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(power)}"
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:.{digits}f}"
