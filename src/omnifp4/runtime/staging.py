"""Reads tensors from disk to where they stay: straight into host memory, or to a GPU through pinned memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.runtime.progress import LoadProgress

STAGING_BYTES: Final = 8 << 20
"""Pinned memory of one thread. More is no faster: a copy of this size already fills the bus."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tensors on disk that stand one behind the other in memory.

    Attributes:
        entries: in the order of memory.
        into: flat uint8 with as many bytes.
    """

    entries: tuple[TensorEntry, ...]
    into: Tensor


def runs(entries: Sequence[TensorEntry], into: Tensor) -> Iterator[Run]:
    """Cut the tensors that fill `into`, one behind the other, into runs of about a staging buffer."""
    flat = into.view(-1).view(torch.uint8)
    begin = end = 0
    waiting: list[TensorEntry] = []
    for entry in entries:
        if waiting and end - begin + entry.nbytes > STAGING_BYTES:
            yield Run(tuple(waiting), flat[begin:end])
            waiting, begin = [], end
        waiting.append(entry)
        end += entry.nbytes
    if end != flat.numel():
        raise ValueError(f"{end} bytes of {[entry.name for entry in entries][:2]} … for {flat.numel()} in memory")
    if waiting:
        yield Run(tuple(waiting), flat[begin:end])


class Stager:
    """Reads runs; safe to use from several threads."""

    def __init__(self, reader: CheckpointReader, progress: LoadProgress) -> None:
        self._reader, self._progress = reader, progress
        self._memory = threading.local()

    def read(self, run: Run) -> None:
        """Fill the memory of a run."""
        if run.into.device.type == "cpu":
            begin = 0
            for entry in run.entries:
                self._read(entry, run.into[begin : begin + entry.nbytes])
                begin += entry.nbytes
        elif len(run.entries) == 1:
            self._read_windows(run.entries[0], run.into)
        else:
            window = self._window(run.into.numel())
            begin = 0
            for entry in run.entries:
                self._read(entry, window[begin : begin + entry.nbytes])
                begin += entry.nbytes
            # The window is written again at once, so the copy must be over: not non-blocking.
            run.into.copy_(window)

    def _read(self, entry: TensorEntry, into: Tensor) -> None:
        with self._progress.reading(self._place(entry), entry.name, entry.nbytes):
            self._reader.read_into(entry, into.numpy())

    def _read_windows(self, entry: TensorEntry, into: Tensor) -> None:
        with self._progress.reading(self._place(entry), entry.name, entry.nbytes):
            for begin in range(0, entry.nbytes, STAGING_BYTES):
                part = into[begin : begin + STAGING_BYTES]
                window = self._window(part.numel())
                self._reader.read_into(entry, window.numpy(), begin)
                part.copy_(window)

    def _window(self, nbytes: int) -> Tensor:
        staging: Tensor | None = getattr(self._memory, "staging", None)
        if staging is None:
            staging = self._memory.staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
        return staging[:nbytes]

    def _place(self, entry: TensorEntry) -> str:
        return f"{self._reader.checkpoint.location}/{entry.shard}"


def total_bytes(found: Iterable[Run]) -> int:
    """Bytes of runs."""
    return sum(run.into.numel() for run in found)
