"""Why a dequantized weight is far from its original: a wrong tensor scale, or the values of another tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dialects import LinearEntries
from omnifp4.checkpoint.dtypes import NUMPY_DTYPES
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.formats.nvfp4 import BLOCK_SIZE, E2M1_VALUES, E4M3_VALUES, unpack
from omnifp4.models.source import SourceTensor
from omnifp4.verification.subject import Subject

EXPLAINED: Final = 4.0
"""Times the expected error under which a guess is taken for the cause."""

LOOKED_AT_BYTES: Final = 1 << 20
"""Of a weight, this much suffices to tell what it is."""

Find = Callable[[str], SourceTensor | None]


@dataclass(frozen=True, slots=True)
class Suspect:
    """A linear whose values are wrong, and the relative squared error that they should have."""

    linear: LinearEntries
    expected: float


def diagnose(suspect: Suspect, find: Find, subject: Subject, readers: tuple[CheckpointReader, CheckpointReader]) -> str:
    """The cause, as an ending for the finding; empty if none of the known ones explains it."""
    good = EXPLAINED * suspect.expected
    module = suspect.linear.module
    decoded = _decoded(suspect.linear, readers[0])
    if decoded is None or not np.isfinite(decoded).all():
        return ""
    if not decoded.any():
        return ": every value looked at is zero"
    original = find(f"{module}.weight")
    if original is None:
        return ""
    rows = len(decoded)
    wide = _widened(original, rows, readers[1])
    factor, rest = _best_factor(wide, decoded)
    if rest < good:
        return f": its tensor scale is {1 / factor:.6g} times what it should be" if factor else ""
    if original.spec.shape[0] == original.spec.shape[1]:
        turned = _widened(original, original.spec.shape[0], readers[1]).T[:rows]
        if _best_factor(turned, decoded)[1] < good:
            return ": it is transposed"
    for name in _candidates(module, subject):
        other = find(f"{name}.weight")
        if other is None or other.spec.shape != original.spec.shape:
            continue
        if _best_factor(_widened(other, rows, readers[1]), decoded)[1] < good:
            return f": these are the values of {name}"
    return ""


def _best_factor(wide: npt.NDArray[np.float64], decoded: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The factor by which `decoded` comes nearest to `wide`, and the relative squared error that is left then."""
    if wide.shape != decoded.shape:
        return 0.0, np.inf
    energy, other = float((wide * wide).sum()), float((decoded * decoded).sum())
    if not energy or not other:
        return 0.0, np.inf
    dot = float((wide * decoded).sum())
    return dot / other, 1.0 - dot * dot / (energy * other)


def _decoded(linear: LinearEntries, reader: CheckpointReader) -> npt.NDArray[np.float64] | None:
    """The first rows, without the tensor scale's magnitude limits: block scales and codes in float64."""
    if linear.block_scale is None or linear.tensor_scale is None:
        return None
    rows, half = linear.packed.shape
    count = _rows_looked_at(rows, 2 * half)
    packed = np.empty((count, half), dtype=np.uint8)
    block = np.empty((count, 2 * half // BLOCK_SIZE), dtype=np.uint8)
    reader.read_into(linear.packed, packed)
    reader.read_into(linear.block_scale, block)
    stored = float(np.asarray(reader.read(linear.tensor_scale)).reshape(-1)[0])
    with np.errstate(all="ignore"):
        scale = np.float64(1.0) / np.float64(stored) if linear.reciprocal else np.float64(stored)
        values = E2M1_VALUES[unpack(packed)].astype(np.float64)
        scales = np.repeat(E4M3_VALUES[block].astype(np.float64), BLOCK_SIZE, axis=1)
        return np.asarray(values * scales * scale)


def _widened(original: SourceTensor, rows: int, reader: CheckpointReader) -> npt.NDArray[np.float64]:
    columns = original.spec.shape[1]
    if original.fused is not None:
        bits: npt.NDArray[Any] = original.read(reader)[:rows]
    else:
        dtype = NUMPY_DTYPES[original.entry.dtype]
        raw = np.empty(rows * columns * dtype.itemsize, dtype=np.uint8)
        reader.read_into(original.entry, raw)
        bits = raw.view(dtype).reshape(rows, columns)
    if original.entry.dtype == "BF16":
        bits = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.float64)


def _rows_looked_at(rows: int, columns: int) -> int:
    return max(1, min(rows, LOOKED_AT_BYTES // max(1, 2 * columns)))


def _candidates(module: str, subject: Subject) -> Iterator[str]:
    """Modules whose values could have come here by mistake: of the same layer first, then the same of other layers."""
    spec = subject.linear_specs.get(module)
    if spec is None:
        return
    stem = module.rsplit(".", 3)[0] if ".experts." in module else module.rpartition(".")[0]
    same_shape = [other for other, its in subject.linear_specs.items() if its.shape == spec.shape and other != module]
    near = [other for other in same_shape if other.startswith(stem)]
    yield from near[:1024]
    leaf = module.rpartition(".")[2]
    yield from [other for other in same_shape if other.endswith(f".{leaf}") and not other.startswith(stem)][:256]
