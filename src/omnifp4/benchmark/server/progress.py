"""How far a load test is: a line every few seconds, with the time that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

EVERY_S: Final = 5.0


class LoadProgress:
    """Tells of answers that have come; safe to call from any thread."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._begin = self._told = time.monotonic()

    def update(self, done: int, total: int, failed: int) -> None:
        """`done` of `total` answers are here, `failed` of them are errors."""
        with self._lock:
            now = time.monotonic()
            if now - self._told < EVERY_S or done == total:
                return
            self._told = now
        left = (total - done) * (now - self._begin) / done
        bad = f", {failed} failed" if failed else ""
        self._say(f"load: {done} of {total} answers{bad}, about {left:.0f} s to go")
