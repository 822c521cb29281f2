"""How far a run of the bench is."""

from __future__ import annotations

import time
from collections.abc import Callable


class Steps:
    """Counts the figures that are still to be measured, and tells about each."""

    def __init__(self, total: int, tell: Callable[[str], None] | None) -> None:
        """`total` is how many `begin` calls there will be; `tell` takes a line for people."""
        self._total, self._tell = total, tell
        self._number = 0
        self._begun = time.monotonic()

    def begin(self, title: str) -> None:
        """The next figure is being measured."""
        gone = time.monotonic() - self._begun
        left = f", about {gone / self._number * (self._total - self._number):.0f} s left" if self._number else ""
        self._number += 1
        if self._tell is not None:
            self._tell(f"[{self._number}/{self._total}] {title} ({gone:.0f} s gone{left})")
