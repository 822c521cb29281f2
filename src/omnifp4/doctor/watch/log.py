"""The record of what happens, one JSON object a line, so that it is there even if the process is killed."""

from __future__ import annotations

import json
import linecache
import sys
import threading
import time
import traceback
from types import FrameType, TracebackType
from typing import Any

TEXT_LIMIT = 4000
FRAMES = 16
KINDS = 40
"""Different messages that are kept; a loop may fail with another one each time."""
OTHERS = "others"
PACKAGES = ("omnifp4", "torch", "transformers", "vllm", "modelopt")
BEAT_S = 0.25


class Log:
    """Events, and counters that a thread writes when they have changed."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115, PTH123
        self._lock = threading.Lock()
        self._written: str = ""
        self.cat_calls = 0
        self.cat_empty = 0
        self.cat_place = ""
        self.calls: dict[str, list[Any]] = {}
        self.thrown: dict[tuple[str, str, str], int] = {}
        self.local = threading.local()

    def event(self, name: str, /, **values: Any) -> None:
        """Write one event."""
        line = json.dumps({"event": name, "at": time.monotonic(), **values}, default=repr)
        with self._lock:
            self._file.write(line + "\n")

    def count_call(self, model: str, error: BaseException | None) -> None:
        """Count an outermost call of a model."""
        row = self.calls.setdefault(model, [0, 0, {}])
        row[0] += 1
        if error is not None:
            row[1] += 1
            text = f"{type(error).__name__}: {error}"[:TEXT_LIMIT]
            if text not in row[2] and len(row[2]) >= KINDS:
                text = OTHERS
            row[2][text] = row[2].get(text, 0) + 1

    def threw(self, phase: str, subject: str, error: BaseException) -> None:
        """Note an exception; again and again the same one is only counted."""
        key = (phase, type(error).__name__, str(error)[:TEXT_LIMIT])
        if key not in self.thrown and len(self.thrown) >= KINDS and phase not in ("script", "thread"):
            return
        self.thrown[key] = self.thrown.get(key, 0) + 1
        if self.thrown[key] == 1:
            self.event("thrown", phase=phase, subject=subject, caller=caller_of(error), **describe(error))

    def beat(self) -> None:
        """Write the counters if they have changed."""
        values = {
            "cat": [self.cat_calls, self.cat_empty, self.cat_place],
            "calls": self.calls,
            "thrown": [[*key, count] for key, count in list(self.thrown.items())],
            "versions": versions(),
        }
        try:
            text = json.dumps(values)
        except RuntimeError:
            return  # Another thread counts; the next beat will do.
        if text != self._written:
            self._written = text
            self.event("counters", **values)

    def start_beating(self) -> None:
        """Write counters from now on, in a thread that ends with the process."""

        def run() -> None:
            while True:
                time.sleep(BEAT_S)
                self.beat()

        threading.Thread(target=run, name="omnifp4-watch", daemon=True).start()


def versions() -> dict[str, str]:
    """The packages of interest that are imported by now; attributes are not asked for, as that may import more."""
    return {name: str(vars(sys.modules[name]).get("__version__", "")) for name in PACKAGES if name in sys.modules}


def describe(error: BaseException) -> dict[str, Any]:
    """Type, message, what led to it, innermost frames, and local lists that are empty there."""
    chain: list[str] = []
    seen = {id(error)}
    other = error.__cause__ or error.__context__
    while other is not None and id(other) not in seen and len(chain) < 8:
        chain.append(f"{type(other).__name__}: {other}"[:TEXT_LIMIT])
        seen.add(id(other))
        other = other.__cause__ or other.__context__
    return {
        "type": type(error).__name__,
        "message": str(error)[:TEXT_LIMIT],
        "chain": chain,
        "frames": frames_of(error.__traceback__),
        "empty": empty_lists(error.__traceback__),
    }


def frames_of(trace: TracebackType | None) -> list[list[Any]]:
    """``[file, line, function, code]`` of the innermost frames, outermost first; ours are left out."""
    found: list[list[Any]] = [
        [frame.filename, frame.lineno, frame.name, frame.line or ""] for frame in traceback.extract_tb(trace)
    ]
    return [frame for frame in found if not is_ours(frame[0])][-FRAMES:]


def is_ours(file: str) -> bool:
    """Whether a frame belongs to the watch itself."""
    return file == "<string>" or file.startswith(("<frozen runpy", _HERE))


def caller_of(error: BaseException) -> str:
    """The innermost line that belongs to the script and its own modules, not to a library."""
    for file, line, function, code in reversed(frames_of(error.__traceback__)):
        if is_own(file):
            return f"{file}:{line} in {function}: {code}"
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (is_ours(frame.f_code.co_filename) or not is_own(frame.f_code.co_filename)):
        frame = frame.f_back
    return place_of(frame)


def is_own(file: str) -> bool:
    """Whether a file is the user's."""
    return not any(part in file for part in ("site-packages", "dist-packages", "/lib/python", "<frozen", "<string>"))


def empty_lists(trace: TracebackType | None) -> list[str]:
    """Names of local lists that are empty in the innermost frame."""
    frame = None
    while trace is not None:
        if not is_ours(trace.tb_frame.f_code.co_filename):
            frame = trace.tb_frame
        trace = trace.tb_next
    if frame is None or frame.f_code.co_name == "<module>":
        return []
    return [name for name, value in frame.f_locals.items() if isinstance(value, list) and not value][:8]


def place_of(frame: FrameType | None) -> str:
    """File, line, function and code of the first frame that is not ours."""
    while frame is not None and is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return ""
    code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}: {code}"


_HERE = __file__.rpartition("/")[0] + "/" if "/" in __file__ else __file__.rpartition("\\")[0]
