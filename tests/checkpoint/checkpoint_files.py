"""Writes safetensors files and checkpoint folders for tests, right or wrong, without the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ITEM_BYTES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1, "I64": 8}

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = ITEM_BYTES[dtype]
    for size in shape:
        count *= size
    return count


def header_object(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON of a right header."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return header


def file_of(header: Any, data: bytes = b"") -> bytes:
    """A file of this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def safetensors_bytes(tensors: Tensors, metadata: Mapping[str, str] | None = None, seed: int = 0) -> bytes:
    """A right file whose data depends on `seed`."""
    size = sum(tensor_bytes(*tensor) for tensor in tensors.values())
    data = bytes((index * 31 + seed) % 251 for index in range(size))
    return file_of(header_object(tensors, metadata), data)


def write_sparse(path: Path, tensors: Tensors) -> None:
    """A right file of any size that takes no room on the disk: its data are zeros."""
    start = file_of(header_object(tensors, {"format": "pt"}))
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + sum(tensor_bytes(*tensor) for tensor in tensors.values()))


def write_checkpoint(folder: Path, shards: Mapping[str, Tensors], *, index: bool = True, sparse: bool = False) -> Path:
    """Config, shards and, if asked for, the index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    for number, (shard, tensors) in enumerate(shards.items()):
        if sparse:
            write_sparse(folder / shard, tensors)
        else:
            (folder / shard).write_bytes(safetensors_bytes(tensors, {"format": "pt"}, seed=number))
    if index:
        write_index(folder, {name: shard for shard, tensors in shards.items() for name in tensors})
    return folder


def write_index(folder: Path, weight_map: Any, **more: Any) -> None:
    content = {"metadata": {"total_size": 123}, "weight_map": weight_map, **more}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


TWO_SHARDS: dict[str, Tensors] = {
    "model-00001-of-00002.safetensors": {"a.weight": ("BF16", (4, 16)), "a.bias": ("F32", (4,))},
    "model-00002-of-00002.safetensors": {
        "b.weight": ("BF16", (2, 16)),
        "scalar": ("F32", ()),
        "none": ("BF16", (0, 3)),
    },
}
