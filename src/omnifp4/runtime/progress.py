"""How far a load is, and where it stands when nothing moves.

A loader that goes silent for minutes teaches nothing. This one tells bytes, rate and time left while it works, and when
no tensor has arrived for a while it tells the file, the tensor, the Python stack and what is likely to be wrong.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TextIO

from omnifp4.runtime.stall import explain_stall

TICK_SECONDS: Final = 0.2
STALL_SECONDS: Final = 30.0
"""Silence after which a load is said to stand still: a shard's largest tensor takes a slow disk a few seconds."""

COMPONENTS: Final = (
    ("talker.code_predictor.", "code predictor"),
    ("talker.", "talker"),
    ("code2wav.", "code2wav"),
    ("token2wav.", "token2wav"),
    ("audio_tower.", "audio tower"),
    ("visual.", "vision tower"),
    ("lm_head", "head"),
    ("embed_tokens", "embeddings"),
    (".experts.", "experts"),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """A tensor that a thread is reading: since when (monotonic seconds)."""

    file: str
    tensor: str
    nbytes: int
    since: float


class LoadProgress:
    """Counts what has been read; tells about it while `running`.

    Safe to use from several threads.
    """

    def __init__(
        self,
        *,
        show: bool = False,
        stream: TextIO | None = None,
        stall_seconds: float = STALL_SECONDS,
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        """Args:
        show: write a line of progress again and again.
        stream: where to; standard error if not given. Stalls are told there in any case.
        stall_seconds: silence that counts as a stall.
        on_progress: called after each tensor with bytes done, bytes in all and the tensor's name.
        """
        self.total_bytes = 0
        self.done_bytes = 0
        self.stalls = 0
        self._show = show
        self._stream = stream
        self._stall_seconds = stall_seconds
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._reading: dict[int, Reading] = {}
        self._last = ""
        self._begin = self._moved = time.monotonic()
        self._running = False

    def expect(self, nbytes: int) -> None:
        """More bytes are going to be read."""
        with self._lock:
            self.total_bytes += nbytes

    @contextmanager
    def reading(self, file: str, tensor: str, nbytes: int) -> Iterator[None]:
        """A tensor of `file` is being read inside."""
        thread = threading.get_ident()
        with self._lock:
            self._reading[thread] = Reading(file, tensor, nbytes, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                self._reading.pop(thread, None)
                self._moved = time.monotonic()
                self.done_bytes += nbytes
                self._last = tensor
        if self._on_progress is not None:
            self._on_progress(self.done_bytes, self.total_bytes, tensor)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Tell about progress and stalls inside; inside another `running` it changes nothing."""
        if self._running:
            yield
            return
        self._running, self._begin = True, time.monotonic()
        self._moved = self._begin
        stop = threading.Event()
        loader = threading.get_ident()
        watch = threading.Thread(target=self._watch, args=(stop, loader), name="omnifp4-load-watch", daemon=True)
        watch.start()
        try:
            yield
        finally:
            stop.set()
            watch.join()
            self._running = False
            if self._show and self.done_bytes:
                self._write("\r" + self.line() + "\n")

    def line(self) -> str:
        """Progress in one line."""
        seconds = max(time.monotonic() - self._begin, 1e-6)
        rate = self.done_bytes / seconds
        share = self.done_bytes / self.total_bytes if self.total_bytes else 0.0
        left = (self.total_bytes - self.done_bytes) / rate if rate else 0.0
        return (
            f"loading {self.done_bytes / 1e9:.2f} of {self.total_bytes / 1e9:.2f} GB  {share:4.0%}  "
            f"{rate / 1e9:.2f} GB/s  {left:.0f} s left  {component_of(self._last):<14}"
        )

    def _watch(self, stop: threading.Event, loader: int) -> None:
        told_at = 0.0
        wait = self._stall_seconds
        tick = min(TICK_SECONDS, self._stall_seconds / 4)
        while not stop.wait(tick):
            with self._lock:
                moved, reading = self._moved, list(self._reading.items())
            if moved > told_at:
                wait = self._stall_seconds
            silent = time.monotonic() - max(moved, told_at)
            if silent >= wait:
                told_at = time.monotonic()
                # Told again after ever longer waits, so that a night of standing still fills no disk.
                wait *= 2
                self.stalls += 1
                self._write(explain_stall(told_at - moved, reading, loader, self.line()))
            elif self._show:
                self._write("\r" + self.line())

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(text)
        stream.flush()


def component_of(tensor: str) -> str:
    """The part of the model that a tensor belongs to, for people."""
    return next((title for mark, title in COMPONENTS if mark in tensor), "layers" if tensor else "")
