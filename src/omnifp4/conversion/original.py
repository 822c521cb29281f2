"""The original wide checkpoint beside an artifact: finding tensors in it, and comparing linears with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.conversion.inspection import LinearState, read_rows
from omnifp4.conversion.linear_units import encode_rows, source_rows
from omnifp4.formats import fast_cpu
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.formats.reference import tensor_scale_for
from omnifp4.models.source import Source, SourceTensor, match_source

SUSPICIOUS_ERROR: Final = 0.015
"""Relative squared error from where on a linear is encoded anew to see whether its values allow no better."""

DAMAGED_RATIO: Final = 4.0
"""Error over that of the sweep from where on a linear is taken for damaged; methods that calibrate stay below."""

THINKER_PREFIX: Final = "thinker."


@dataclass(frozen=True, slots=True)
class Comparison:
    """A linear beside its original.

    Attributes:
        error: relative squared error; infinite where values are not finite.
        swapped_error: the same if the two codes of every byte changed places.
    """

    error: float
    swapped_error: float


@dataclass(frozen=True)
class Original:
    """The original wide checkpoint, open for reading."""

    source: Source
    reader: CheckpointReader

    @property
    def name(self) -> str:
        """Its folder's name."""
        return Path(self.source.checkpoint.location).absolute().name

    @cached_property
    def _tensors(self) -> dict[str, SourceTensor]:
        return {tensor.spec.name: tensor for tensor in self.source.tensors}

    def find(self, name: str) -> SourceTensor | None:
        """The original of a tensor; the artifact may hold the thinker alone, without its prefix."""
        for candidate in (name, THINKER_PREFIX + name, name.removeprefix(THINKER_PREFIX)):
            if candidate in self._tensors:
                return self._tensors[candidate]
        return None

    def find_linear(self, state: LinearState) -> SourceTensor | None:
        """The original of a linear, if it has the same shape."""
        found = self.find(f"{state.module}.weight")
        return found if found is not None and found.spec.shape == state.shape else None


def open_original(folder: Path) -> Source:
    """Open the original. Raises CheckpointError if it is quantized or damaged, ModelError if it is of no known type."""
    return match_source(open_checkpoint(folder))


def compare(
    reader: CheckpointReader,
    state: LinearState,
    original: Original,
    tensor: SourceTensor,
    tensor_scale: np.float32 | None = None,
) -> Comparison:
    """Compare a linear, whose parts have the right shapes, with its original.

    Args:
        reader: of the artifact.
        state: of the linear.
        original: where `tensor` is.
        tensor: what the linear was made from.
        tensor_scale: taken in place of the stored one.
    """
    linear = state.linear
    scale = state.tensor_scale if tensor_scale is None else tensor_scale
    assert linear.block_scale is not None and scale is not None
    error = energy = swapped = 0.0
    nonfinite = 0
    for begin, rows in source_rows(original.reader, tensor):
        packed = read_rows(reader, linear.packed, begin, begin + len(rows))
        scales = read_rows(reader, linear.block_scale, begin, begin + len(rows))
        with np.errstate(all="ignore"):
            stats = fast_cpu.compare(rows, tensor.entry.dtype, packed, scales, scale, linear.reciprocal)
        error, energy = error + stats.squared_error, energy + stats.energy
        swapped, nonfinite = swapped + stats.swapped_squared_error, nonfinite + stats.nonfinite
    if nonfinite:
        return Comparison(float("inf"), float("inf"))
    if not energy:
        return Comparison(*(0.0 if not value else float("inf") for value in (error, swapped)))
    return Comparison(error / energy, swapped / energy)


def is_damaged(error: float, original: Original, tensor: SourceTensor) -> bool:
    """Whether a linear errs far more than its values call for."""
    if error <= SUSPICIOUS_ERROR:
        return False
    return error > DAMAGED_RATIO * max(best_error(original, tensor), SUSPICIOUS_ERROR / DAMAGED_RATIO)


def best_error(original: Original, tensor: SourceTensor) -> float:
    """Relative squared error of encoding a linear by the sweep."""
    amax = max(fast_cpu.scan(rows, tensor.entry.dtype).amax for _, rows in source_rows(original.reader, tensor))
    scale = tensor_scale_for(amax, ScaleRule.SWEEP)
    error = energy = 0.0
    for _, rows in source_rows(original.reader, tensor):
        stats = encode_rows(rows, tensor.entry.dtype, scale)[2]
        error, energy = error + stats.squared_error, energy + stats.energy
    return error / energy if energy else 0.0
