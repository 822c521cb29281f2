"""The checksums in omnifp4.json as witnesses: which tensors changed, and whether a mend gives the old bytes back."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.conversion.blocks import swap_nibbles
from omnifp4.formats.nvfp4 import UInt8Array

CHUNK_BYTES = 8 << 20


def changed_tensors(reader: CheckpointReader, receipt: Mapping[str, Any] | None, threads: int) -> dict[str, int]:
    """Recorded CRC-32 of every tensor that has other bytes now; empty where nothing was recorded."""
    recorded = (receipt or {}).get("tensors")
    if not isinstance(recorded, dict):
        return {}
    tensors = reader.checkpoint.tensors
    known = [name for name, crc in recorded.items() if name in tensors and isinstance(crc, int)]
    with ThreadPoolExecutor(threads) as pool:
        now = pool.map(lambda name: _checksum(_chunks(reader, tensors[name])), known)
        return {name: recorded[name] for name, crc in zip(known, now, strict=True) if crc != recorded[name]}


def swapped_checksum(reader: CheckpointReader, entry: TensorEntry) -> int:
    """CRC-32 of a tensor's bytes with the two codes of each exchanged."""
    return _checksum(swap_nibbles(chunk) for chunk in _chunks(reader, entry))


def scalar_checksum(value: np.float32) -> int:
    """CRC-32 of one stored number."""
    return zlib.crc32(np.array([value], dtype="<f4").tobytes())


def _checksum(chunks: Iterator[UInt8Array]) -> int:
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(chunk.data, crc)
    return crc


def _chunks(reader: CheckpointReader, entry: TensorEntry) -> Iterator[UInt8Array]:
    for position in range(0, entry.nbytes, CHUNK_BYTES):
        chunk = np.empty(min(CHUNK_BYTES, entry.nbytes - position), dtype=np.uint8)
        reader.read_into(entry, chunk, position)
        yield chunk
