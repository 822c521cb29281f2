"""Safetensors headers, read and written without torch, trusting nothing.

A file is: 8 bytes little-endian header length N, N bytes of JSON, then the data. The JSON maps each tensor name to
``{"dtype", "shape", "data_offsets": [begin, end]}`` with offsets relative to the start of the data, and may have
``__metadata__`` with string values. Offsets must cover the data without gap or overlap.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from omnifp4.checkpoint.dtypes import DTYPE_BITS, byte_count
from omnifp4.errors import CheckpointError

HEADER_LIMIT_BYTES: Final = 100_000_000
"""Longest header that is read: the limit of the safetensors library itself."""

LENGTH_BYTES: Final = 8
METADATA_KEY: Final = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor's bytes are.

    Attributes:
        name: checkpoint name.
        shard: name of the file in the checkpoint's folder.
        dtype: as in the header, such as ``BF16``.
        shape: as in the header.
        begin: offset of the first byte **in the file**.
        end: offset after the last byte in the file.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def parameters(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def strict_json(text: str | bytes, subject: str) -> Any:
    """Parse JSON, refusing duplicate keys, NaN and absurd nesting; errors name `subject`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            twice = next(key for key, count in Counter(key for key, _ in items).items() if count > 1)
            raise CheckpointError(f"{subject}: key {twice!r} occurs twice")
        return result

    def constant(name: str) -> Any:
        raise CheckpointError(f"{subject}: {name} is not valid JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{subject}: not valid JSON: {reason}") from None


def header_length(prefix: bytes, file_bytes: int, subject: str) -> int:
    """The header length that the first 8 bytes of a file state, checked against the file's size."""
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"{subject}: truncated, {file_bytes} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", prefix[:LENGTH_BYTES])
    if length > HEADER_LIMIT_BYTES:
        raise CheckpointError(f"{subject}: header length {length} is absurd; at most {HEADER_LIMIT_BYTES} is allowed")
    if LENGTH_BYTES + length > file_bytes:
        raise CheckpointError(f"{subject}: truncated, the header needs {LENGTH_BYTES + length} of {file_bytes} bytes")
    return int(length)


def parse_header(raw: bytes, shard: str, file_bytes: int, subject: str) -> tuple[list[TensorEntry], dict[str, str]]:
    """Entries and metadata of a header.

    Args:
        raw: the JSON bytes, without the 8 bytes before them.
        shard: file name that the entries carry.
        file_bytes: size of the whole file.
        subject: path or address for messages.

    Raises:
        CheckpointError: anything that a right safetensors file cannot have, naming file and tensor.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{subject}: the header is not UTF-8, so this is no safetensors file") from None
    header = strict_json(text, f"{subject}: header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{subject}: the header is no JSON object")
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{subject}: {METADATA_KEY} is not a map of strings")
    if not all(_is_text(text) for item in metadata.items() for text in item):
        raise CheckpointError(f"{subject}: {METADATA_KEY} holds text that is not Unicode")
    data_begin = LENGTH_BYTES + len(raw)
    entries = [_entry(name, info, shard, data_begin, file_bytes, subject) for name, info in header.items()]
    _check_cover(entries, data_begin, file_bytes, subject)
    return entries, metadata


def _entry(name: str, info: Any, shard: str, data_begin: int, file_bytes: int, subject: str) -> TensorEntry:
    where = f"{subject}: tensor {name!r}"
    if not _is_text(name):
        raise CheckpointError(f"{where}: the name is not Unicode")
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header must give exactly dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not _is_sizes(shape):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} are not [begin, end]")
    try:
        expected = byte_count(dtype, tuple(shape))
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(f"{where}: {offsets[1] - offsets[0]} bytes where {dtype} {shape} needs {expected}")
    if data_begin + offsets[1] > file_bytes:
        raise CheckpointError(f"{where}: truncated, its bytes end at {data_begin + offsets[1]} of {file_bytes}")
    return TensorEntry(name, shard, dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _is_text(value: str) -> bool:
    """Whether it can be written again: JSON may hold half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_cover(entries: list[TensorEntry], data_begin: int, file_bytes: int, subject: str) -> None:
    position = data_begin
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise CheckpointError(f"{subject}: tensor {entry.name!r} {problem}")
        position = entry.end
    if position != file_bytes:
        raise CheckpointError(f"{subject}: {file_bytes - position} bytes belong to no tensor")


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Lay tensors out in the order given.

    Args:
        tensors: ``(name, dtype, shape)``.
        metadata: string values for ``__metadata__``.

    Returns:
        The file's bytes before the data (length included, padded so that the data starts at a multiple of 8), and
        each tensor's ``(begin, end)`` in the file.
    """
    header: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        if name in header:
            raise ValueError(f"{name}: cannot be laid out twice")
        end = position + byte_count(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = LENGTH_BYTES + len(text)
    offsets = {
        name: (begin + info["data_offsets"][0], begin + info["data_offsets"][1])
        for name, info in header.items()
        if name != METADATA_KEY
    }
    return struct.pack("<Q", len(text)) + text, offsets
