"""Reading many tensors with several threads, in bounded memory, with progress."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader

PANEL_BYTES: Final = 16 << 20
"""Most bytes of one tensor that a thread holds at a time."""

BATCH_BYTES: Final = 4 << 20
"""Small tensors are handed to a thread together, up to about this many bytes."""

GAP_BYTES: Final = 4096
"""Scalars this near to each other are read at once."""

Progress = Callable[[int, int, str], None]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Meter:
    """Adds up the bytes that are done and tells a listener, from any thread."""

    def __init__(self, listener: Progress | None, total: int) -> None:
        """`total`: bytes that will be read in all."""
        self._listener, self._total, self._done = listener, total, 0
        self._lock = threading.Lock()

    def add(self, count: int, what: str) -> None:
        """`count` more bytes are done."""
        if self._listener is None:
            return
        with self._lock:
            self._done += count
            self._listener(min(self._done, self._total), self._total, what)


def default_threads() -> int:
    """As many as there are processors for this process, at most 16: beyond that the disk is the limit."""
    return max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Neighbouring items together, up to `BATCH_BYTES`."""
    batch: list[Item] = []
    filled = 0
    for item in items:
        batch.append(item)
        filled += size(item)
        if filled >= BATCH_BYTES:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Results in the order of `items`; an error ends it, and no more is begun."""
    if threads == 1:
        yield from map(work, items)
        return
    remaining = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[Result]] = [pool.submit(work, item) for item in islice(remaining, 4 * threads)]
        try:
            while waiting:
                first = waiting.pop(0)
                while not first.done():
                    wait([first], return_when=FIRST_COMPLETED)
                yield first.result()
                waiting += [pool.submit(work, item) for item in islice(remaining, 1)]
        finally:
            for future in waiting:
                future.cancel()


def read_scalars(reader: CheckpointReader, entries: Sequence[TensorEntry]) -> dict[str, np.float32]:
    """Float32 tensors of one value, by name; those side by side in a shard are read together."""
    values: dict[str, np.float32] = {}
    ordered = sorted(entries, key=lambda entry: (entry.shard, entry.begin))
    start = 0
    while start < len(ordered):
        stop = start + 1
        while (
            stop < len(ordered)
            and ordered[stop].shard == ordered[start].shard
            and ordered[stop].begin - ordered[stop - 1].end <= GAP_BYTES
            and ordered[stop].end - ordered[start].begin <= PANEL_BYTES
        ):
            stop += 1
        first, last = ordered[start], ordered[stop - 1]
        span = TensorEntry(first.name, first.shard, "U8", (last.end - first.begin,), first.begin, last.end)
        data = reader.read(span).tobytes()
        for entry in ordered[start:stop]:
            values[entry.name] = np.frombuffer(data, dtype="<f4", count=1, offset=entry.begin - first.begin)[0]
        start = stop
    return values


class Buffers(threading.local):
    """Each thread's own memory, used again for every tensor: fresh pages cost more than reading into them."""

    def __init__(self) -> None:
        """Nothing is held until it is asked for."""
        self._held: dict[str, npt.NDArray[np.uint8]] = {}

    def take(self, role: str, count: int) -> npt.NDArray[np.uint8]:
        """`count` bytes, overwritten when the same thread takes the same role again."""
        held = self._held.get(role)
        if held is None or held.size < count:
            held = self._held[role] = np.empty(max(count, 1 << 16), dtype=np.uint8)
        return held[:count]
