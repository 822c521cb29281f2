"""MXFP4: four bits a value, one power-of-two scale for 32 values (OCP Microscaling Formats, version 1.0).

A value is a sign and an E2M1 magnitude, as in NVFP4. 32 consecutive values along the input dimension share a scale in
E8M0: a byte b that stands for ``2**(b - 127)``; 255 is NaN. That is 4.25 bits a weight. Two codes share a byte, the
even column in the low nibble.

    weight[r, c]  ~  e2m1[codes[r, c]] * 2**(block_scale[r, c // 32] - 127)
"""

from __future__ import annotations

from typing import Final

import numpy as np

from omnifp4.formats.nvfp4 import E2M1_MAX, E2M1_VALUES, Float32Array, ScaleRule, UInt8Array, pack, unpack
from omnifp4.formats.rows import check_amax
from omnifp4.formats.scheme import Scheme

BLOCK_SIZE: Final = Scheme.MXFP4.block_size
E8M0_BIAS: Final = 127
E8M0_NAN: Final = 255
E8M0_ONE: Final = 127
"""Bits of 1, the scale of a block of zeros."""

E8M0_MIN_BITS: Final = 27
"""Bits of 2**-100, the smallest scale written: every product stays a normal float32 number."""

E2M1_MAX_EXPONENT: Final = 2
"""Exponent of 6, the largest E2M1 number."""

E8M0_VALUES: Final = np.append(np.ldexp(np.float32(1.0), np.arange(255) - E8M0_BIAS), np.nan).astype(np.float32)
"""The value of each of the 256 E8M0 bit patterns."""

E8M0_INVERSES: Final = np.append(np.ldexp(np.float32(1.0), E8M0_BIAS - np.arange(255)), np.nan).astype(np.float32)
"""The reciprocal of each."""

_CODE_OF_HALVES: Final = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=np.uint8)
"""The E2M1 code of each magnitude, counted in halves."""


def choose_scales(weight: Float32Array, rule: ScaleRule) -> UInt8Array:
    """The scale of each block.

    Under `ScaleRule.MAX` and `ScaleRule.FOUR_OVER_SIX` it is the one of the OCP specification: the exponent of the
    largest magnitude, rounded down, less 2. The largest value then lies in [4, 8), and what is beyond 6 becomes 6.
    Under `ScaleRule.SWEEP` it is that one or the next larger, whichever gives the smaller squared error.

    Args:
        weight: float32 ``[out, in]``, `in` a multiple of 32.
        rule: see above.

    Returns:
        E8M0 bits, uint8 ``[out, in / 32]``, never 255.

    Raises:
        ValueError: a shape does not fit, or a value is NaN, infinite or too large.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK_SIZE:
        raise ValueError(f"shape {weight.shape} is not [out, in] with in a multiple of {BLOCK_SIZE}")
    blocks = _blocks(weight)
    amax = np.abs(blocks).max(axis=-1, initial=0.0)
    check_amax(amax)
    _, exponent = np.frexp(amax)
    # frexp's fraction lies in [0.5, 1), so the exponent rounded down is one less.
    bits = np.maximum(exponent.astype(np.int32) - 1 - E2M1_MAX_EXPONENT + E8M0_BIAS, E8M0_MIN_BITS)
    lower = np.where(amax == 0.0, E8M0_ONE, bits).astype(np.uint8)
    if rule is not ScaleRule.SWEEP:
        return lower
    # In units of the lower scale, where nothing underflows; the exact product of two powers of two.
    units = np.abs(blocks) * E8M0_INVERSES[lower][..., None]
    halves = units * np.float32(0.5)
    upper_wins = _squares(2 * (halves - _nearest(halves))) < _squares(units - _nearest(units))
    return np.where(upper_wins, lower + np.uint8(1), lower)


def encode_codes(weight: Float32Array, block_scale: UInt8Array) -> UInt8Array:
    """Round every value under given scales, ties to even: float32 ``[out, in]`` to packed codes uint8 ``[out, in / 2]``."""
    # A scale is a power of two, so the multiplication is exact.
    scaled = _blocks(weight) * E8M0_INVERSES[block_scale][..., None]
    codes = _CODE_OF_HALVES[(_nearest(np.abs(scaled)) * np.float32(2.0)).astype(np.uint8)]
    codes |= np.signbit(scaled).view(np.uint8) << np.uint8(3)
    return pack(codes.reshape(weight.shape))


def decode(packed: UInt8Array, block_scale: UInt8Array) -> Float32Array:
    """The float32 ``[out, in]`` values that codes ``[out, in / 2]`` and scales ``[out, in / 32]`` stand for."""
    values = _blocks(E2M1_VALUES[unpack(packed)])
    return np.asarray(values * E8M0_VALUES[block_scale][..., None]).reshape(packed.shape[0], -1)


def _blocks(weight: Float32Array) -> Float32Array:
    return weight.reshape(weight.shape[0], -1, BLOCK_SIZE)


def _nearest(magnitude: Float32Array) -> Float32Array:
    """The nearest E2M1 magnitude, ties to the even code, beyond 6 to 6; as `reference.round_to_e2m1`, without a search.

    E2M1's step is half the power of two under the value, and half below 1. Adding and subtracting 1.5 * 2**22 times that
    power of two rounds to it, because float32 has no finer bits there.
    """
    held = np.minimum(magnitude, np.float32(E2M1_MAX))
    power = np.maximum(held, np.float32(1.0)).view(np.uint32) & np.uint32(0x7F800000)
    rounder = (power + np.uint32((22 << 23) + 0x400000)).view(np.float32)
    return (held + rounder) - rounder


def _squares(difference: Float32Array) -> Float32Array:
    """Sum of squares of each block."""
    return np.asarray(np.einsum("rbi,rbi->rb", difference, difference), dtype=np.float32)
