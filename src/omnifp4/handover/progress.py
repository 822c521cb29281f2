"""How far an engine's start is: one line on a terminal, a line at each new step elsewhere."""

from __future__ import annotations

import sys
from typing import Final, TextIO

from omnifp4.handover.log_reading import plain, step_of

QUIET_S: Final = 30.0
"""Where there is no terminal, a line comes at each new step, and after so much silence."""


class StartProgress:
    """Tells of the step that the log names, of the time that has passed, and of the time limit."""

    def __init__(self, engine: str, timeout_s: float, stream: TextIO | None = None) -> None:
        """`timeout_s`: when the start counts as failed."""
        self._engine, self._timeout_s = engine, timeout_s
        self._stream = stream or sys.stderr
        self._step = "starting"
        self._told_at = 0.0
        self._shown = ""

    def update(self, lines: list[str], seconds: float) -> None:
        """New lines of the log, and the seconds since the start."""
        before = self._step
        for line in lines:
            self._step = step_of(plain(line)) or self._step
        text = f"{self._engine}: {self._step}, {seconds:.0f} s of at most {self._timeout_s:.0f} s"
        if self._stream.isatty():
            self._stream.write(f"\r{text:<{len(self._shown)}}")
            self._shown = text
        elif self._step.partition(",")[0] != before.partition(",")[0] or seconds - self._told_at >= QUIET_S:
            self._told_at = seconds
            self._stream.write(text + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()
