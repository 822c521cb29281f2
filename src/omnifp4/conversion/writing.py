"""Writing the weights of a converted or repaired artifact: units that copy or compute, through a staging folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.output import OutputWriter, PlannedOutput
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.checkpoint.staging import Staging
from omnifp4.checkpoint.units import Progress, check_finished, work_through

COPY_CHUNK_BYTES: Final = 8 << 20
COPY_UNIT_BYTES: Final = 32 << 20
"""Small tensors are copied together, up to this many bytes."""


@dataclass(frozen=True)
class Tools:
    """What a unit works with.

    Attributes:
        reader: of the artifact.
        writer: of the new artifact.
        source: reader of the original wide checkpoint, where one was given.
    """

    reader: CheckpointReader
    writer: OutputWriter
    source: CheckpointReader | None = None


class WorkUnit(Protocol):
    """See `omnifp4.checkpoint.units.Unit`."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def run(self, tools: Tools) -> dict[str, Any]:
        """Do the work; ``crc`` of the result holds the CRC-32 of every tensor written."""
        ...


@dataclass(frozen=True)
class CopyUnit:
    """Tensors whose bytes are copied, maybe under another name.

    Attributes:
        entries: where the bytes are, by the name they get.
        from_source: they come from the original, not from the artifact.
    """

    entries: Mapping[str, TensorEntry]
    from_source: bool = False

    @property
    def name(self) -> str:
        return f"{'fetch' if self.from_source else 'copy'}:{next(iter(self.entries))}"

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def run(self, tools: Tools) -> dict[str, Any]:
        reader = tools.source if self.from_source else tools.reader
        assert reader is not None
        buffer = np.empty(COPY_CHUNK_BYTES, dtype=np.uint8)
        crcs = {}
        for name, entry in self.entries.items():
            crc = position = 0
            while position < entry.nbytes:
                chunk = buffer[: min(COPY_CHUNK_BYTES, entry.nbytes - position)]
                reader.read_into(entry, chunk, position)
                crc = tools.writer.write(name, chunk, position, crc)
                position += chunk.nbytes
            crcs[name] = crc
        return {"crc": crcs}


@dataclass(frozen=True)
class ScalarUnit:
    """Single float32 numbers, by the name of their tensor."""

    values: Mapping[str, np.float32]

    @property
    def name(self) -> str:
        return f"scalars:{next(iter(self.values))}"

    @property
    def nbytes(self) -> int:
        return 4 * len(self.values)

    def run(self, tools: Tools) -> dict[str, Any]:
        write = tools.writer.write
        return {"crc": {name: write(name, np.array([value], dtype="<f4")) for name, value in self.values.items()}}


def copy_units(entries: Mapping[str, TensorEntry], *, from_source: bool = False) -> Iterator[CopyUnit]:
    """Units that copy tensors, small ones together."""
    waiting: dict[str, TensorEntry] = {}
    size = 0
    for name, entry in entries.items():
        if waiting and size + entry.nbytes > COPY_UNIT_BYTES:
            yield CopyUnit(waiting, from_source)
            waiting, size = {}, 0
        waiting[name] = entry
        size += entry.nbytes
    if waiting:
        yield CopyUnit(waiting, from_source)


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        records: result of every unit, in order.
        resumed_units: how many an earlier run had finished.
    """

    records: tuple[Mapping[str, Any], ...]
    resumed_units: int

    @property
    def checksums(self) -> dict[str, int]:
        """CRC-32 of every tensor, by name."""
        return {name: crc for record in self.records for name, crc in record["crc"].items()}


def write_weights(
    units: Sequence[WorkUnit],
    planned: PlannedOutput,
    staging: Staging,
    reader: CheckpointReader,
    source: CheckpointReader | None,
    threads: int,
    progress: Progress | None,
) -> Written:
    """Do all units that are not done, and wait until their bytes are on the disk. Raises OSError."""
    with OutputWriter(staging.folder, planned) as writer:
        resumed = check_finished(staging, units, writer, threads)
        tools = Tools(reader, writer, source)
        work_through(units, staging, lambda unit: unit.run(tools), threads, progress)
        writer.sync()
    return Written(tuple(staging.finished[unit.name] for unit in units), resumed)
