"""The one place that prints: data on stdout, talk on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from omnifp4.errors import OutputError

QUIET_SECONDS = 2.0
"""Work shorter than this shows no progress line where there is no terminal."""


def check_receipt(path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written after it.

    Raises:
        OutputError: its folder is missing or may not be written to, or it is a folder itself.
    """
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder", hint="--receipt FILE")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: {path.parent} is no folder", hint="make it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: {path.parent} may not be written to", hint="choose another folder")


class Output:
    """Prints one run's result and its talk."""

    def __init__(self, *, as_json: bool) -> None:
        """`as_json`: stdout gets one JSON document and nothing else."""
        self.as_json = as_json
        self._data = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
        self._talk = Console(stderr=True, highlight=False, soft_wrap=True)

    def result(self, record: BaseModel, shown: RenderableType) -> None:
        """The result: the record as JSON, or what a person reads."""
        if self.as_json:
            sys.stdout.write(record.model_dump_json(indent=2) + "\n")
            # Here a full disk or a reader that went away can still be told.
            sys.stdout.flush()
        else:
            self._data.print(shown)

    def show(self, shown: RenderableType) -> None:
        """Something a person reads on stdout; nothing in JSON mode."""
        if not self.as_json:
            self._data.print(shown)

    def say(self, text: str) -> None:
        """One line of talk."""
        self._talk.print(escape(text))

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int, str], None]]:
        """A bar with rate and remaining time on a terminal; a line every ten seconds elsewhere.

        Yields:
            A function of bytes done, bytes in all, and what was worked on; safe to call from any thread.
        """
        if not self._talk.is_terminal:
            yield _lines(self.say, title)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[item]}"),
        )
        with Progress(*columns, console=self._talk, transient=True, refresh_per_second=5) as bar:
            task = bar.add_task(title, total=None, item="")
            yield lambda done, total, item: bar.update(task, completed=done, total=total, item=item[-60:])

    @contextmanager
    def steps(self, title: str) -> Iterator[Callable[[int, int, str], None]]:
        """As `progress`, for steps of any kind, and for several runs from none to all, one after the other."""
        if not self._talk.is_terminal:
            yield _lines(self.say, title, rate=False)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[item]}"),
        )
        with Progress(*columns, console=self._talk, transient=True, refresh_per_second=5) as bar:
            task = bar.add_task(title, total=None, item="")
            before = 0

            def update(done: int, total: int, item: str) -> None:
                nonlocal before
                if done < before:
                    bar.reset(task)
                before = done
                bar.update(task, completed=done, total=total, item=item[:60])

            yield update


def _lines(say: Callable[[str], None], title: str, *, rate: bool = True) -> Callable[[int, int, str], None]:
    started = time.monotonic()
    next_line = started + QUIET_SECONDS
    before = 0

    def update(done: int, total: int, item: str) -> None:
        nonlocal next_line, started, before
        now = time.monotonic()
        if done < before or not done:
            started = now
        before = done
        if now < next_line or not done or now == started:
            return
        next_line = now + 10.0
        speed = done / (now - started)
        told = f"{speed / 1e6:.0f} MB/s, " if rate else ""
        say(f"{title}: {done / total:.0%}, {told}{(total - done) / speed:.0f} s to go, {item}")

    return update
