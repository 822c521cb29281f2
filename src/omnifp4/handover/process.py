"""The engine's process: started in a group of its own, its log kept in a file, watched, and stopped cleanly."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from omnifp4.errors import OmniFP4Error

INTERRUPT_S: Final = 30.0
"""How long an engine may take to stop by itself."""
TERMINATE_S: Final = 10.0
POLL_S: Final = 0.5


class EngineProcess:
    """A running engine; as a context manager it is stopped at the end, whatever happens."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start it, with `environment` beside this process's own variables; its output goes to `log`.

        Raises:
            OmniFP4Error: the program cannot be started.
        """
        self.log = log
        self._read_to = 0
        self._rest = ""
        # Its own group: Ctrl-C in the terminal reaches us alone, and we stop all of its processes in order.
        try:
            with log.open("wb") as out:
                self._process = subprocess.Popen(
                    list(arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )
        except OSError as error:
            raise OmniFP4Error(f"{arguments[0]}: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def status(self) -> int | None:
        """With which it ended; None while it runs."""
        return self._process.poll()

    def new_lines(self) -> list[str]:
        """Whole lines of the log since the last call."""
        with self.log.open("rb") as file:
            file.seek(self._read_to)
            data = file.read()
        self._read_to += len(data)
        # A progress bar ends its lines with a carriage return.
        *lines, self._rest = (self._rest + data.decode("utf-8", "replace")).replace("\r", "\n").split("\n")
        return lines

    def all_lines(self) -> list[str]:
        """The whole log."""
        return self.log.read_text("utf-8", "replace").replace("\r", "\n").split("\n")

    def stop(self) -> None:
        """Ask it to stop as Ctrl-C does, then more firmly; processes that it left behind are ended too. Idempotent."""
        for number, seconds in ((signal.SIGINT, INTERRUPT_S), (signal.SIGTERM, TERMINATE_S)):
            if self._process.poll() is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        # The group outlives its leader if a worker hangs: it would hold the GPU.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def wait_until(
    is_ready: Callable[[], bool],
    process: EngineProcess,
    timeout_s: float,
    on_lines: Callable[[list[str], float], None],
) -> bool:
    """Wait until `is_ready`; False if the process ended or the time is up before.

    Args:
        on_lines: told of new lines of the log and of the seconds that have passed, several times a second.
    """
    begin = time.monotonic()
    while True:
        seconds = time.monotonic() - begin
        on_lines(process.new_lines(), seconds)
        if process.status() is not None:
            return False
        if is_ready():
            return True
        if seconds > timeout_s:
            return False
        time.sleep(POLL_S)
