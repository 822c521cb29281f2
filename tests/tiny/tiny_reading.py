"""A safetensors reader for the tests that shares no code with the writer under test."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header entries (metadata included) and the position of the first data byte."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def read_bits(folder: Path) -> dict[str, NDArray[np.uint16]]:
    """BF16 bit patterns of every tensor in every shard, by name."""
    tensors: dict[str, NDArray[np.uint16]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, start = read_header(path)
        data = path.read_bytes()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "BF16", name
            first, end = entry["data_offsets"]
            assert name not in tensors, name
            tensors[name] = np.frombuffer(data[start + first : start + end], "<u2").reshape(entry["shape"])
    return tensors


def to_float(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)
