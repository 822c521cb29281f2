"""A WAV file that is valid after every chunk, so that Ctrl-C, or worse, leaves what was said so far."""

from __future__ import annotations

import os
import wave
from pathlib import Path
from types import TracebackType

import numpy as np

from omnifp4.chat.answer import SAMPLING_RATE, Waveform
from omnifp4.chat.errors import ChatError


class WavWriter:
    """Writes 16-bit mono as it comes; the standard library's writer mends the header after each chunk."""

    def __init__(self, path: str | os.PathLike[str], sampling_rate: int = SAMPLING_RATE) -> None:
        """Creates or replaces the file at once, so that a path that cannot be written is known before any work."""
        self.path = Path(path)
        self.samples = 0
        try:
            self._file = self.path.open("wb")
        except OSError as error:
            raise ChatError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._wave = wave.open(self._file, "wb")  # noqa: SIM115 - open as long as this object
        self._wave.setnchannels(1)
        self._wave.setsampwidth(2)
        self._wave.setframerate(sampling_rate)
        self._wave.writeframes(b"")
        self._file.flush()

    def write(self, waveform: Waveform) -> None:
        """Appends samples in [-1, 1]; what lies outside is clipped."""
        data = np.rint(np.clip(waveform, -1, 1) * 32767).astype("<i2")
        try:
            self._wave.writeframes(data.tobytes())
            self._file.flush()
        except OSError as error:
            raise ChatError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.samples += len(data)

    def close(self) -> None:
        self._wave.close()
        self._file.close()

    def __enter__(self) -> WavWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is not None and not self.samples:
            # A file without a sound would look like an answer that had nothing to say.
            self.path.unlink(missing_ok=True)
