"""The script's process: started, listened to, and stopped when it stands still."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

WATCH: Final = Path(__file__).parent / "watch"
POLL_S: Final = 0.05
LOOK_S: Final = 0.5
"""How often the process's own counters are read."""
DUMP_S: Final = 3.0
TAIL_LINES: Final = 4000
LINE_LIMIT: Final = 1 << 16
RSS_STEP: Final = 1 << 24
BUSY_SHARE: Final = 0.05
"""Of a processor; other programs may take the rest."""

BOOT: Final = """
import importlib.util, sys
home, log, stacks, script, *rest = sys.argv[1:]
spec = importlib.util.spec_from_file_location("_omnifp4_watch", home + "/__init__.py", submodule_search_locations=[home])
module = importlib.util.module_from_spec(spec)
sys.modules["_omnifp4_watch"] = module
spec.loader.exec_module(module)
from _omnifp4_watch.run import main
main(log, stacks, script, rest)
"""


@dataclass
class Run:
    """How a run went.

    Attributes:
        status: exit status; negative: the signal that ended it; None: we ended it.
        stalled_for: seconds without any sign of progress, when it was stopped for that; 0 otherwise.
        busy: whether it used the processor meanwhile.
    """

    status: int | None = None
    seconds: float = 0.0
    timed_out: bool = False
    stalled_for: float = 0.0
    busy: bool = False
    peak_rss: int = 0
    lines: list[str] = field(default_factory=list)


class Child:
    """One run of a script."""

    def __init__(
        self, script: Path, arguments: Sequence[str], folder: Path, on_output: Callable[[str], None] | None
    ) -> None:
        """`folder` takes the record; `on_output` gets every line that the script prints."""
        self.log, self.stacks = folder / "events.jsonl", folder / "stacks.txt"
        self.log.touch()
        self._on_output = on_output
        self._run = Run()
        self._bytes = 0
        command = [sys.executable, "-c", BOOT, str(WATCH), str(self.log), str(self.stacks), str(script), *arguments]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        rest = b""
        while chunk := os.read(stream.fileno(), 1 << 16):
            self._bytes += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._take(line)
            if len(rest) > LINE_LIMIT:
                rest = rest[-LINE_LIMIT:]
        if rest:
            self._take(rest)

    def _take(self, raw: bytes) -> None:
        """One line; of a progress bar that overwrites itself, its last state."""
        line = raw.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
        self._run.lines.append(line)
        if len(self._run.lines) > TAIL_LINES:
            del self._run.lines[: TAIL_LINES // 2]
        if self._on_output is not None:
            self._on_output(line)

    def wait(self, timeout: float | None, stall_seconds: float, is_loading: Callable[[], bool]) -> Run:
        """Until it ends, or is stopped.

        Args:
            timeout: seconds after which it is stopped in any case; None: never.
            stall_seconds: seconds without progress after which it is stopped, if it is loading a model or idle.
            is_loading: whether a model is being loaded just now.
        """
        begin = moved = looked = time.monotonic()
        seen, cpu_then = self._signs(), self._usage()[0]
        try:
            while self._process.poll() is None:
                time.sleep(POLL_S)
                now = time.monotonic()
                if timeout is not None and now - begin > timeout:
                    self._run.timed_out = True
                    self._stop()
                    break
                if now - looked < min(LOOK_S, stall_seconds / 4):
                    continue
                looked, signs = now, self._signs()
                if signs != seen:
                    seen, moved, cpu_then = signs, now, self._usage()[0]
                    continue
                if now - moved < stall_seconds:
                    continue
                cpu = self._usage()[0]
                busy = cpu is not None and cpu_then is not None and cpu - cpu_then > BUSY_SHARE * (now - moved)
                if is_loading() or (cpu is not None and not busy):
                    self._run.stalled_for, self._run.busy = now - moved, busy
                    self._stop()
                    break
                moved, cpu_then = now, cpu  # It computes without a word: that is its right.
        except BaseException:
            self._kill()
            raise
        self._reader.join(timeout=2.0)
        self._run.seconds = time.monotonic() - begin
        if not self._run.timed_out and not self._run.stalled_for:
            self._run.status = self._process.returncode
        return self._run

    def _signs(self) -> tuple[Any, ...]:
        """What moves while a script gets on: output, events, bytes read or written, memory."""
        _, moved_bytes, rss = self._usage()
        self._run.peak_rss = max(self._run.peak_rss, rss)
        with contextlib.suppress(OSError):
            return self._bytes, self.log.stat().st_size, moved_bytes, rss // RSS_STEP
        return self._bytes, moved_bytes, rss // RSS_STEP

    def _usage(self) -> tuple[float | None, int, int]:
        """CPU seconds, bytes of I/O and resident bytes of all its processes; None where the system does not tell."""
        if not Path("/proc/self/stat").exists():
            return None, 0, 0
        ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        cpu, moved, rss = 0.0, 0, 0
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) != self._process.pid:
                    continue
                cpu += (int(fields[11]) + int(fields[12])) / ticks
                rss += int(fields[21]) * page
                rows = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
                moved += int(rows["rchar"]) + int(rows["wchar"]) + int(rows["read_bytes"])
            except (OSError, ValueError, KeyError, IndexError):
                continue
        return cpu, moved, rss

    def _stop(self) -> None:
        """Have it write its stack, then end it."""
        if hasattr(signal, "SIGUSR1"):
            with contextlib.suppress(OSError):
                self._process.send_signal(signal.SIGUSR1)
                end = time.monotonic() + DUMP_S
                while time.monotonic() < end and (not self.stacks.exists() or not self.stacks.stat().st_size):
                    time.sleep(POLL_S)
                time.sleep(POLL_S)
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
