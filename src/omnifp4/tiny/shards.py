"""Safetensors shards laid out before any weight exists, so that tensors can be written in any order and in parallel.

Torch is not imported; a BF16 tensor is two bytes an element, whatever made them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from omnifp4.errors import OutputError

BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one BF16 tensor inside a shard.

    Attributes:
        name: checkpoint name.
        shape: of the tensor.
        offset: first byte, counted from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def byte_count(self) -> int:
        return BF16_BYTES * prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its header bytes (length prefix included) and where each tensor goes."""

    file_name: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def byte_count(self) -> int:
        last = self.slots[-1]
        return last.offset + last.byte_count


def plan_shards(tensors: Iterable[tuple[str, tuple[int, ...]]], shard_bytes: int) -> tuple[Shard, ...]:
    """Distributes tensors over files in their order, as Transformers does.

    Args:
        tensors: names and shapes.
        shard_bytes: the most data bytes in one file; a larger tensor gets a file of its own.

    Returns:
        The shards; a single one is named ``model.safetensors``.
    """
    groups: list[list[tuple[str, tuple[int, ...]]]] = []
    filled = 0
    for name, shape in tensors:
        size = BF16_BYTES * prod(shape)
        if not groups or filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape))
        filled += size
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    return tuple(_shard(name, group) for name, group in zip(names, groups, strict=True))


def _shard(file_name: str, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors:
        end = position + BF16_BYTES * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    slots = []
    position = len(header)
    for name, shape in tensors:
        slots.append(Slot(name, shape, position))
        position += BF16_BYTES * prod(shape)
    return Shard(file_name, header, tuple(slots))


def index_text(shards: Sequence[Shard]) -> str:
    """The text of ``model.safetensors.index.json``."""
    slots = [(slot, shard) for shard in shards for slot in shard.slots]
    document = {
        "metadata": {"total_size": sum(slot.byte_count for slot, _ in slots)},
        "weight_map": {slot.name: shard.file_name for slot, shard in sorted(slots, key=lambda pair: pair[0].name)},
    }
    return json.dumps(document, indent=2) + "\n"


def claim_folder(folder: Path) -> None:
    """Makes `folder`; refuses one that holds anything.

    Raises:
        OutputError: the folder is not empty, is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = next(folder.iterdir(), None) is not None
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    if occupied:
        raise OutputError(f"the folder {folder} is not empty", hint="name a new folder, or empty this one")


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file under a temporary name, then renames it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
