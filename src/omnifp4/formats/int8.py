"""INT8: integers from -127 to 127, one scale for each output channel, no zero point.

    weight[r, c]  ~  codes[r, c] * scale[r]

Scales are BF16 numbers, because that is what kernels hold them in. -128 is never written, so that the format is
symmetric.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from omnifp4.formats.nvfp4 import Float32Array, ScaleRule
from omnifp4.formats.reference import round_to_bf16
from omnifp4.formats.rows import row_amax, within_limits

INT8_MAX: Final = 127.0

Int8Array = npt.NDArray[np.int8]


def choose_scales(weight: Float32Array, rule: ScaleRule) -> Float32Array:
    """The scale of each row, ``amax / 127`` rounded to BF16, under every rule: float32 ``[out, in]`` to float32 ``[out]``.

    Rounding moves the largest value by less than half a step, so it still becomes 127.

    Raises:
        ValueError: a value is NaN, infinite or too large.
    """
    del rule  # A channel is long enough that clipping its largest value never pays.
    scale = within_limits(row_amax(weight) / np.float32(INT8_MAX))
    return (round_to_bf16(scale).astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode_codes(weight: Float32Array, scale: Float32Array) -> Int8Array:
    """Round every value under given scales, ties to even: float32 ``[out, in]`` to int8 ``[out, in]``."""
    return np.asarray(np.rint(weight / scale[:, None]).clip(-INT8_MAX, INT8_MAX).astype(np.int8))


def decode(codes: Int8Array, scale: Float32Array) -> Float32Array:
    """The float32 ``[out, in]`` values that codes and scales ``[out]`` (or ``[1]``, of a whole tensor) stand for."""
    return np.asarray(codes.astype(np.float32) * scale[:, None], dtype=np.float32)
