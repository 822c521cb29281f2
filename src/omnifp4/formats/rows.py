"""What the formats with one scale for each output channel have in common."""

from __future__ import annotations

import numpy as np

from omnifp4.formats.nvfp4 import AMAX_LIMIT, TENSOR_SCALE_MIN, Float32Array


def row_amax(weight: Float32Array) -> Float32Array:
    """Largest magnitude of each row: float32 ``[out, in]`` to float32 ``[out]``.

    Raises:
        ValueError: not two-dimensional, or a value is NaN, infinite or too large.
    """
    if weight.ndim != 2:
        raise ValueError(f"shape {weight.shape} is not [out, in]")
    amax = np.abs(weight).max(axis=1, initial=0.0)
    check_amax(amax)
    return np.asarray(amax, dtype=np.float32)


def check_amax(amax: Float32Array) -> None:
    """Raise ValueError unless every largest magnitude can be encoded."""
    largest = float(amax.max(initial=0.0))
    if not largest <= AMAX_LIMIT:
        raise ValueError(f"largest magnitude {largest} cannot be encoded; at most {AMAX_LIMIT:g} is allowed")


def within_limits(scale: Float32Array) -> Float32Array:
    """Scales of rows, none so small that products leave float32's normal numbers; 1 for a row of zeros."""
    return np.where(scale == 0.0, np.float32(1.0), np.maximum(scale, np.float32(TENSOR_SCALE_MIN)))
