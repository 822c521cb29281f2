"""Hidden states of all samples between two layers: in host memory, above a limit or for a resumable run in files."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

from omnifp4.errors import OutputError

JOURNAL_NAME: Final = "segments.json"
LOCK_NAME: Final = "segments.lock"


def restart_if_ahead(work: Path, layers: int) -> None:
    """Let the next run of a folder begin anew if its states are behind more layers than `layers`, which are known to be done.

    After a loss of power another journal may know less than this one.
    """
    path = work / JOURNAL_NAME
    journal = _journal(path)
    if isinstance(journal, dict) and isinstance(journal.get("layers"), int) and journal["layers"] > layers:
        path.unlink()


def _journal(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


class States:
    """States of a few hundred samples, ``(1, tokens, hidden)`` each, one behind the other."""

    def __init__(
        self,
        tokens: Sequence[int],
        hidden: int,
        dtype: torch.dtype,
        *,
        limit_bytes: int,
        keep_before: bool = False,
        work: Path | None = None,
        key: str = "",
    ) -> None:
        """Memory for all.

        Args:
            tokens: of each sample.
            hidden: width.
            dtype: of the states.
            limit_bytes: above it they lie in a file that is mapped into memory, which the system may write out.
            keep_before: a layer's states stay until all samples have passed the next, so that it can be run again.
            work: folder for a run that can go on after it was killed; None if it need not.
            key: of that run: what another run left is used only under the same key.

        Raises:
            OutputError: the file cannot be made, or another run is at work in the folder.
        """
        self._starts = [0]
        for count in tokens:
            self._starts.append(self._starts[-1] + count)
        self._hidden, self._dtype, self._work, self._key = hidden, dtype, work, key
        self.nbytes = self._starts[-1] * hidden * dtype.itemsize
        self.done = 0
        """Layers that all samples have passed."""
        if work is not None:
            self._lock = _locked(work)
            self.done = self._read_journal(work)
            self._banks = [self._map(work / "states-0.bin"), self._map(work / "states-1.bin")]
        elif self.nbytes * (1 + keep_before) > limit_bytes:
            self._banks = [self._map_nameless() for _ in range(1 + keep_before)]
        else:
            self._banks = [torch.empty(self._starts[-1], hidden, dtype=dtype) for _ in range(1 + keep_before)]

    def read(self, sample: int) -> Tensor:
        """States of a sample after `done` layers, on the host."""
        return self._bank(self.done)[self._starts[sample] : self._starts[sample + 1]].unsqueeze(0)

    def write(self, sample: int, states: Tensor, layers: int) -> None:
        """States of a sample after `layers` layers: `done`, or the one that is being run."""
        self._bank(layers)[self._starts[sample] : self._starts[sample + 1]].copy_(states[0])

    def passed(self, layers: int) -> None:
        """All samples have passed `layers` layers; a resumable run is continued from here."""
        self.done = layers
        if self._work is None:
            return
        path = self._work / JOURNAL_NAME
        for name in ("states-0.bin", "states-1.bin"):
            descriptor = os.open(self._work / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"key": self._key, "layers": layers}))
        partial.replace(path)

    def _bank(self, layers: int) -> Tensor:
        return self._banks[layers % len(self._banks)]

    def _map_nameless(self) -> Tensor:
        with tempfile.NamedTemporaryFile(prefix="omnifp4-states-", delete=False) as file:
            path = Path(file.name)
        try:
            return self._map(path)
        finally:
            # The mapping keeps it until the end, whatever the end is.
            path.unlink()

    def _map(self, path: Path) -> Tensor:
        try:
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.truncate(self.nbytes)
                if self.nbytes and hasattr(os, "posix_fallocate"):
                    # A mapped file with holes ends the process by a signal where the disk has no room to fill them.
                    os.posix_fallocate(file.fileno(), 0, self.nbytes)
            count = self.nbytes // self._dtype.itemsize
            return torch.from_file(str(path), shared=True, size=count, dtype=self._dtype).view(-1, self._hidden)
        except (OSError, RuntimeError) as error:
            told = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise OutputError(
                f"{path}: {self.nbytes:,} bytes of hidden states cannot be kept there: {told}",
                hint="free some space, then the same command again",
            ) from None

    def _read_journal(self, work: Path) -> int:
        journal = _journal(work / JOURNAL_NAME)
        whole = all(
            (work / name).is_file() and (work / name).stat().st_size == self.nbytes
            for name in ("states-0.bin", "states-1.bin")
        )
        same = isinstance(journal, dict) and journal.get("key") == self._key and isinstance(journal.get("layers"), int)
        return int(journal["layers"]) if same and whole else 0


def _locked(work: Path) -> IO[str]:
    """The folder's lock, held for as long as the file is open: two runs would write over each other's states."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        file = (work / LOCK_NAME).open("w", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{work}: cannot be made: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise OutputError(
            f"{work}: another run is at work there", hint="wait for its end, or name another folder"
        ) from None
    return file
