"""Where the hand-over says what it does: the command line's output, or a plain one for a caller of the library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol

from rich.console import Console, RenderableType
from rich.markup import escape

LINE_EVERY_S: Final = 10.0


class Talk(Protocol):
    """What `omnifp4.cli.output.Output` can do, as far as it is needed here."""

    def show(self, shown: RenderableType) -> None:
        """A result, on stdout."""

    def say(self, text: str) -> None:
        """A line of talk, on stderr."""

    def progress(self, title: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        """A function to be told of bytes done, bytes in all, and the item."""


class PlainTalk:
    """Results to stdout, talk to stderr."""

    def __init__(self) -> None:
        self._data = Console(soft_wrap=True, highlight=False)
        self._talk = Console(stderr=True, soft_wrap=True, highlight=False)

    def show(self, shown: RenderableType) -> None:
        """See `Talk.show`."""
        self._data.print(shown)

    def say(self, text: str) -> None:
        """See `Talk.say`."""
        self._talk.print(escape(text))

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int, str], None]]:
        """See `Talk.progress`: a line every ten seconds."""
        begin = told = time.monotonic()

        def update(done: int, total: int, item: str) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= LINE_EVERY_S and done:
                told = now
                left = (total - done) * (now - begin) / done
                self.say(f"{title}: {done / total:.0%}, {left:.0f} s to go, {item}")

        yield update
