"""Looking at the parts of each NVFP4 linear: shapes, scalars, and every block-scale byte."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dialects import LinearEntries
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.conversion.artifact import Artifact
from omnifp4.formats.nvfp4 import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, E4M3_VALUES, UInt8Array

BoolArray = npt.NDArray[np.bool_]

NAN_BITS: Final = 0x7F
SIGN_BIT: Final = 0x80
MAGNITUDE_CODES: Final = 0x77
"""Mask over two codes that leaves their magnitudes."""

LARGEST_WEIGHT: Final = 1e5
"""No trained weight is as large: scales that could decode to more are taken for damage."""

SMALLEST_LARGEST_WEIGHT: Final = 1e-15
"""A linear whose largest weight is smaller does nothing: uninitialised scales give that."""

ABOVE_SIBLINGS: Final = 1000.0
"""Largest weight over the median of its like in other layers and experts; a forgotten tensor scale gives 2688."""

SMALLEST_INPUT: Final = 1e-12
LARGEST_INPUT: Final = 1e8
"""Between these is the largest input that an input scale can allow for."""

CHUNK_BYTES: Final = 2 << 20
"""Of codes held at a time; decoded they take eight times as much, and twice."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Damaged block scales of one linear.

    Attributes:
        blocks: all of them.
        zero_empty: zero, over codes that are all zero.
        zero_full: zero, over other codes.
        negative: with the sign bit set, not zero and not NaN.
        nan_empty: NaN, over codes that are all zero.
        nan_full: NaN, over other codes.
        largest: the largest finite scale, its sign left out.
    """

    blocks: int = 0
    zero_empty: int = 0
    zero_full: int = 0
    negative: int = 0
    nan_empty: int = 0
    nan_full: int = 0
    largest: float = 0.0

    @property
    def damaged(self) -> int:
        return self.zero_empty + self.zero_full + self.negative + self.nan_empty + self.nan_full

    @property
    def unusable(self) -> int:
        """Those that no loader can use; a zero over zeros is harmless in most."""
        return self.damaged - self.zero_empty

    @property
    def losing(self) -> int:
        """Blocks of which the scale cannot be told from the file."""
        return self.zero_full + self.negative + self.nan_full

    def __str__(self) -> str:
        texts = {
            "zero": self.zero_empty + self.zero_full,
            "negative": self.negative,
            "NaN": self.nan_empty + self.nan_full,
        }
        return " and ".join(f"{count:,} {name}" for name, count in texts.items() if count)


@dataclass(frozen=True, slots=True)
class LinearState:
    """What one linear's files hold.

    Attributes:
        module: its name.
        linear: its tensors.
        shape: ``(out, in)`` that it should have.
        wrong_parts: clauses on parts that are missing or of the wrong type or shape.
        tensor_scale: as stored; None if missing.
        scale_problem: clause on a tensor scale that cannot be right; empty if it can.
        input_scale: as stored; None if missing, not finite and positive, or absurd.
        counts: of block scales.
    """

    module: str
    linear: LinearEntries
    shape: tuple[int, int]
    wrong_parts: tuple[str, ...]
    tensor_scale: np.float32 | None
    scale_problem: str
    input_scale: np.float32 | None
    counts: BlockCounts

    @property
    def largest_weight(self) -> float:
        """The largest weight that its scales allow; 0 where they are missing or wrong."""
        if self.wrong_parts or self.tensor_scale is None or not self.tensor_scale > 0:
            return 0.0
        return E2M1_MAX * self.counts.largest * _factor(self.tensor_scale, self.linear.reciprocal)


def inspect_linears(artifact: Artifact, reader: CheckpointReader, threads: int) -> dict[str, LinearState]:
    """Look at every linear. Reads all block scales, and codes only where a block scale is damaged."""
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda linear: inspect_linear(artifact, reader, linear), artifact.linears.values())
        states = {state.module: state for state in found}
    _compare_siblings(artifact, states)
    return states


def _compare_siblings(artifact: Artifact, states: dict[str, LinearState]) -> None:
    kinds: dict[tuple[str, str], list[LinearState]] = {}
    for module, state in states.items():
        spec = artifact.specs.get(module)
        if spec is not None and state.largest_weight and not state.scale_problem:
            kinds.setdefault((spec.component.name, module.rpartition(".")[2]), []).append(state)
    for siblings in kinds.values():
        median = statistics.median(state.largest_weight for state in siblings)
        for state in siblings:
            if state.largest_weight > ABOVE_SIBLINGS * median:
                ratio = state.largest_weight / median
                problem = f"the tensor scale is {state.tensor_scale}: weights {ratio:,.0f} times those of its like"
                states[state.module] = replace(state, scale_problem=problem)


def inspect_linear(artifact: Artifact, reader: CheckpointReader, linear: LinearEntries) -> LinearState:
    """Look at one linear; raises CheckpointError if a file cannot be read."""
    spec = artifact.specs.get(linear.module)
    shape = (
        spec.shape if spec else (*linear.packed.shape[:-1], linear.packed.shape[-1] * 2) if linear.packed.shape else ()
    )
    if len(shape) != 2:
        return LinearState(linear.module, linear, (0, 0), ("its codes are no matrix",), None, "", None, BlockCounts())
    wide_shape = (shape[0], shape[1])
    wrong = tuple(_wrong_parts(artifact, linear, wide_shape))
    tensor_scale = read_scalar(reader, linear.tensor_scale)
    counts = BlockCounts() if wrong else count_blocks(reader, linear)
    problem = "" if tensor_scale is None else scale_problem(tensor_scale, counts.largest, reciprocal=linear.reciprocal)
    input_scale = read_scalar(reader, linear.input_scale)
    if input_scale is not None and not _is_usable_input(input_scale, linear.reciprocal):
        input_scale = None
    return LinearState(linear.module, linear, wide_shape, wrong, tensor_scale, problem, input_scale, counts)


def _wrong_parts(artifact: Artifact, linear: LinearEntries, shape: tuple[int, int]) -> Iterator[str]:
    rows, columns = shape
    if columns % BLOCK_SIZE:
        yield f"width {columns} is not a multiple of {BLOCK_SIZE}"
        return
    if linear.reciprocal != artifact.dialect.reciprocal:
        yield f"it is not in the dialect of the other linears, {artifact.dialect.name}"
        return
    if linear.packed.shape != (rows, columns // 2):
        yield f"codes are {list(linear.packed.shape)}, not {[rows, columns // 2]}"
    scale = linear.block_scale
    if scale is None:
        yield "block scales are missing"
    elif scale.dtype not in {"F8_E4M3", "U8"} or scale.shape != (rows, columns // BLOCK_SIZE):
        yield f"block scales are {scale.dtype} {list(scale.shape)}, not F8_E4M3 {[rows, columns // BLOCK_SIZE]}"
    if linear.tensor_scale is None:
        yield "the tensor scale is missing"
    elif linear.tensor_scale.dtype != "F32" or linear.tensor_scale.parameters != 1:
        yield f"the tensor scale is {linear.tensor_scale.dtype} {list(linear.tensor_scale.shape)}, not one F32"


def read_scalar(reader: CheckpointReader, entry: TensorEntry | None) -> np.float32 | None:
    """The value of a one-element F32 tensor; None if it is something else."""
    if entry is None or entry.dtype != "F32" or entry.parameters != 1:
        return None
    return np.float32(reader.read(entry).reshape(-1)[0])


def scale_problem(stored: np.float32, largest_block: float, *, reciprocal: bool) -> str:
    """Why a stored tensor scale cannot be right; empty if it can.

    Args:
        stored: as in the checkpoint.
        largest_block: the largest block scale under it; 0 if there is none.
        reciprocal: it divides.
    """
    if not np.isfinite(stored) or stored <= 0:
        return f"the tensor scale is {stored}"
    largest = E2M1_MAX * largest_block * _factor(stored, reciprocal)
    if not largest <= LARGEST_WEIGHT or 0 < largest < SMALLEST_LARGEST_WEIGHT:
        return f"the tensor scale is {stored}, which makes weights up to {largest:.1e}"
    return ""


def _is_usable_input(stored: np.float32, reciprocal: bool) -> bool:
    if not np.isfinite(stored) or not stored > 0:
        return False
    return SMALLEST_INPUT < E2M1_MAX * E4M3_MAX * _factor(stored, reciprocal) < LARGEST_INPUT


def _factor(stored: np.float32, reciprocal: bool) -> float:
    return 1.0 / float(stored) if reciprocal else float(stored)


def count_blocks(reader: CheckpointReader, linear: LinearEntries) -> BlockCounts:
    """Count damaged block scales of a linear whose parts have the right shapes."""
    assert linear.block_scale is not None
    scales = np.asarray(reader.read(linear.block_scale), dtype=np.uint8)
    damaged = is_damaged(scales)
    magnitudes = scales & ~np.uint8(SIGN_BIT)
    largest = float(E4M3_VALUES[magnitudes[magnitudes != NAN_BITS].max(initial=0)])
    if not damaged.any():
        return BlockCounts(scales.size, largest=largest)
    totals = np.zeros(5, dtype=np.int64)
    for begin, packed in read_row_chunks(reader, linear.packed):
        rows = slice(begin, begin + len(packed))
        empty = is_empty(packed)
        bits = scales[rows]
        magnitude = bits & ~np.uint8(SIGN_BIT)
        zero, nan = magnitude == 0, magnitude == NAN_BITS
        negative = (bits >= SIGN_BIT) & ~zero & ~nan
        totals += [np.count_nonzero(m) for m in (zero & empty, zero & ~empty, negative, nan & empty, nan & ~empty)]
    zero_empty, zero_full, signed, nan_empty, nan_full = (int(total) for total in totals)
    return BlockCounts(scales.size, zero_empty, zero_full, signed, nan_empty, nan_full, largest)


def is_damaged(scales: UInt8Array) -> BoolArray:
    """Where a block scale is zero, negative or NaN."""
    return np.logical_not(E4M3_VALUES[scales] > 0)


def is_empty(packed: UInt8Array) -> BoolArray:
    """Where all 16 codes of a block are zeros: ``[out, in / 2]`` to bool ``[out, in / 16]``."""
    magnitudes = (packed & MAGNITUDE_CODES).reshape(packed.shape[0], -1, BLOCK_SIZE // 2)
    return np.asarray(magnitudes.max(axis=-1, initial=0) == 0)


def read_row_chunks(reader: CheckpointReader, entry: TensorEntry) -> Iterator[tuple[int, UInt8Array]]:
    """First row and bytes of each range of rows of a byte matrix."""
    rows, row_bytes = entry.shape
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for begin in range(0, rows, step):
        yield begin, read_rows(reader, entry, begin, min(begin + step, rows))


def read_rows(reader: CheckpointReader, entry: TensorEntry, begin: int, end: int) -> UInt8Array:
    """Rows of a byte matrix, as a fresh array."""
    chunk = np.empty((end - begin, entry.shape[1]), dtype=np.uint8)
    reader.read_into(entry, chunk.reshape(-1), begin * entry.shape[1])
    return chunk
