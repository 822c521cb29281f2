"""FP8: eight bits a value in E4M3, one float32 scale for each output channel.

    weight[r, c]  ~  e4m3[codes[r, c]] * scale[r]

E4M3 (float8_e4m3fn) has four significant bits, magnitudes from 2**-9 to 448, and no infinity. Values are rounded to
nearest, ties to the even code.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from omnifp4.formats.nvfp4 import E4M3_MAX, E4M3_VALUES, Float32Array, ScaleRule, UInt8Array
from omnifp4.formats.rows import row_amax, within_limits

_SMALLEST_NORMAL: Final = np.float32(2.0**-6)
_EXPONENT_SHIFT: Final = np.uint32((127 - 7) << 3)
"""Between the exponent fields of float32 and of E4M3, in units of an E4M3 code."""


def choose_scales(weight: Float32Array, rule: ScaleRule) -> Float32Array:
    """The scale of each row: float32 ``[out, in]`` to float32 ``[out]``.

    The largest value becomes 448: ``amax / 448``, what other tools write. Under `ScaleRule.SWEEP` that is rounded up to a
    power of two. E4M3 is a floating-point format, so the error is much the same (on Gaussian
    weights 0.703e-3 against 0.700e-3), and the decoded weight has four significant bits: exact in BF16 in whatever
    order a library multiplies.

    Raises:
        ValueError: a value is NaN, infinite or too large.
    """
    scale = row_amax(weight) / np.float32(E4M3_MAX)
    if rule is ScaleRule.SWEEP:
        fraction, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1.0), np.where(fraction == 0.5, exponent - 1, exponent)).astype(np.float32)
    return within_limits(scale)


def encode_codes(weight: Float32Array, scale: Float32Array) -> UInt8Array:
    """Round every value under given scales, beyond 448 to 448: float32 ``[out, in]`` to E4M3 bits uint8 ``[out, in]``."""
    return round_to_bits(weight / scale[:, None])


def round_to_bits(values: Float32Array) -> UInt8Array:
    """Round float32 to E4M3 bits with their sign, ties to even, beyond 448 to 448: uint8 of the same shape."""
    magnitude = np.minimum(np.abs(values), np.float32(E4M3_MAX))
    bits = magnitude.view(np.uint32)
    normal = ((bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - _EXPONENT_SHIFT
    # Below the smallest normal number codes count multiples of 2**-9.
    below = np.rint(magnitude * np.float32(512.0)).astype(np.uint32)
    codes = np.where(magnitude >= _SMALLEST_NORMAL, normal, below).astype(np.uint8)
    sign: npt.NDArray[np.uint8] = np.signbit(values).view(np.uint8) << np.uint8(7)
    return codes | sign


def decode(codes: UInt8Array, scale: Float32Array) -> Float32Array:
    """The float32 ``[out, in]`` values that codes and scales ``[out]`` (or ``[1]``, of a whole tensor) stand for."""
    return np.asarray(E4M3_VALUES[codes] * scale[:, None], dtype=np.float32)
