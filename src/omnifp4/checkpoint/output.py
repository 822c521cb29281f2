"""Writing a sharded checkpoint whose every byte has its place before the first is written.

Because names, types and shapes of all tensors are known from headers alone, so are the shard files, their headers and
their sizes: a plan states them, and the tensors may then be written in any order, by any thread, again after a crash.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dialects.coded import StoredTensor
from omnifp4.checkpoint.dtypes import DTYPE_BITS, byte_count
from omnifp4.checkpoint.folder import SINGLE_SHARD_NAME
from omnifp4.checkpoint.header import build_header

DEFAULT_SHARD_BYTES: Final = 5_000_000_000
SHARD_METADATA: Final = {"format": "pt"}
CHUNK_BYTES: Final = 8 << 20
TEMPORARY_SUFFIX: Final = ".tmp"
"""End of the name of a small file that is being written; its first character is a dot."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard file to be written.

    Attributes:
        file_name: in the output folder.
        header: the bytes before the data.
        offsets: ``(begin, end)`` in the file, by tensor name.
        total_bytes: size of the file.
    """

    file_name: str
    header: bytes
    offsets: Mapping[str, tuple[int, int]]
    total_bytes: int


@dataclass(frozen=True)
class PlannedOutput:
    """All shard files of a checkpoint to be written."""

    shards: tuple[PlannedShard, ...]
    tensor_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all shard files, headers included."""
        return sum(shard.total_bytes for shard in self.shards)

    def index(self) -> dict[str, Any] | None:
        """The content of the index file; None for a single shard, which needs none."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: shard.file_name for shard in self.shards for name in shard.offsets}
        return {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def plan_output(groups: Iterable[Sequence[StoredTensor]], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> PlannedOutput:
    """Divide tensors into shards, in order, keeping the tensors of a group in one shard.

    Within a shard, wider types come first, so that every tensor is aligned to its element.

    Args:
        groups: tensors that belong together, such as codes and scales of one linear.
        max_shard_bytes: a shard holds more only if a single group does.
    """
    return plan_shards(divide_into_shards(groups, max_shard_bytes))


def divide_into_shards(
    groups: Iterable[Sequence[StoredTensor]], max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[list[StoredTensor]]:
    """The tensors of each shard, as `plan_output` divides them; always at least one shard."""
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for group in groups:
        size = sum(byte_count(tensor.dtype, tensor.shape) for tensor in group)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].extend(group)
        filled += size
    return shards


def plan_shards(shards: Sequence[Sequence[StoredTensor]]) -> PlannedOutput:
    """Lay out shards whose tensors are decided already. Within a shard, wider types come first."""
    planned = []
    total = 0
    for number, tensors in enumerate(shards, 1):
        ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
        header, offsets = build_header(((t.name, t.dtype, t.shape) for t in ordered), SHARD_METADATA)
        single = len(shards) == 1
        name = SINGLE_SHARD_NAME if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        end = max((end for _, end in offsets.values()), default=len(header))
        total += sum(byte_count(tensor.dtype, tensor.shape) for tensor in ordered)
        planned.append(PlannedShard(name, header, offsets, end))
    return PlannedOutput(tuple(planned), total)


class OutputWriter:
    """Writes tensors to their places in the shard files of a folder; safe to use from several threads at once."""

    def __init__(self, folder: Path, planned: PlannedOutput) -> None:
        """Create the shard files that are not there yet, at full size, with their headers. Raises OSError."""
        self._files: dict[str, int] = {}
        self._places: dict[str, tuple[int, int, int]] = {}
        try:
            for shard in planned.shards:
                file = os.open(folder / shard.file_name, os.O_RDWR | os.O_CREAT, 0o644)
                self._files[shard.file_name] = file
                os.ftruncate(file, shard.total_bytes)
                write_all(file, shard.header, 0)
                self._places.update({name: (file, begin, end) for name, (begin, end) in shard.offsets.items()})
        except OSError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def write(self, name: str, data: npt.NDArray[np.generic], offset: int = 0, crc: int = 0) -> int:
        """Write bytes of a tensor, from `offset` in its place on.

        Args:
            name: of the tensor.
            data: contiguous.
            offset: where in the tensor's bytes `data` begins.
            crc: CRC-32 of the bytes before them.

        Returns:
            CRC-32 of the bytes up to the end of `data`.

        Raises:
            ValueError: `data` does not fit into the tensor's place.
            OSError: the disk is full or broken.
        """
        file, begin, end = self._places[name]
        view = data.reshape(-1).view(np.uint8).data
        if begin + offset + len(view) > end:
            raise ValueError(f"{name}: {len(view)} bytes from {offset} on do not fit a place of {end - begin}")
        write_all(file, view, begin + offset)
        return zlib.crc32(view, crc)

    def checksum(self, name: str) -> int:
        """CRC-32 of what stands in a tensor's place."""
        file, begin, end = self._places[name]
        crc = 0
        while begin < end:
            chunk = os.pread(file, min(CHUNK_BYTES, end - begin), begin)
            if not chunk:
                break
            crc = zlib.crc32(chunk, crc)
            begin += len(chunk)
        return crc

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        for file in self._files.values():
            os.fsync(file)


def write_all(file: int, data: bytes | memoryview, position: int) -> None:
    """Write all of `data` at `position`, however often the system stops short."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, position)
        view, position = view[count:], position + count


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON as Transformers does (two spaces, newline at the end), atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
