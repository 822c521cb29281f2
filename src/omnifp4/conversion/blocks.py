"""Mending block scales from the artifact alone, and moving a linear to another tensor scale."""

from __future__ import annotations

import math

import numpy as np

from omnifp4.conversion.inspection import NAN_BITS, SIGN_BIT, is_damaged, is_empty
from omnifp4.formats.fast_cpu import decode_into, effective_scale, encode_into
from omnifp4.formats.nvfp4 import BLOCK_SIZE, E4M3_MIN_BITS, E4M3_VALUES, Float32Array, ScaleRule, UInt8Array
from omnifp4.formats.reference import round_to_e4m3


def swap_nibbles(packed: UInt8Array) -> UInt8Array:
    """Exchange the two codes of every byte."""
    return np.asarray((packed << 4) | (packed >> 4), dtype=np.uint8)


def mend_block_scales(packed: UInt8Array, scales: UInt8Array) -> tuple[UInt8Array, UInt8Array]:
    """Make every block scale finite and positive.

    - negative: the sign bit goes. No tool writes one; codes carry the signs.
    - zero, or NaN over codes that are all zero: the smallest scale.
    - zero over other codes: the block decodes to zeros, so its codes become zeros, under the smallest scale.
    - NaN over other codes: the lower median of the row's sound scales, or of all rows' where it has none. That is a
      guess. The largest scale would be a worse one: a block whose scale overflowed when it was made has lost its codes
      too, because they were divided by NaN.

    Args:
        packed: ``[rows, in / 2]``.
        scales: E4M3 bits ``[rows, in / 16]``.

    Returns:
        Both, mended; the arguments stay as they are.
    """
    mended = scales.copy()
    magnitude = scales & ~np.uint8(SIGN_BIT)
    negative = (scales >= SIGN_BIT) & (magnitude != 0) & (magnitude != NAN_BITS)
    mended[negative] = magnitude[negative]
    empty = is_empty(packed)
    zero = magnitude == 0
    mended[zero | ((magnitude == NAN_BITS) & empty)] = E4M3_MIN_BITS
    codes = packed.reshape(*scales.shape, BLOCK_SIZE // 2).copy()
    codes[zero & ~empty] = 0
    lost = is_damaged(mended)
    for row in np.flatnonzero(lost.any(axis=1)):
        sound = mended[row][~lost[row]]
        mended[row][lost[row]] = _lower_median(sound if sound.size else mended[~lost])
    return codes.reshape(packed.shape), mended


def _lower_median(bits: UInt8Array) -> int:
    """Of E4M3 bits; they sort as the numbers do."""
    return int(np.sort(bits)[(bits.size - 1) // 2]) if bits.size else E4M3_MIN_BITS


def rescale(
    packed: UInt8Array, scales: UInt8Array, stored: np.float32, target: np.float32, *, reciprocal: bool
) -> tuple[UInt8Array, UInt8Array, float, float]:
    """Express the same weights under another tensor scale.

    Where the ratio is a power of two and the block scale stays in E4M3's range, the codes stay and nothing changes.
    Elsewhere block scale and codes of least squared error against the decoded weights are taken.

    Args:
        packed: ``[rows, in / 2]``.
        scales: E4M3 bits ``[rows, in / 16]``, all finite and positive.
        stored: the tensor scale they were made for.
        target: the tensor scale they get.
        reciprocal: both divide.

    Returns:
        New codes and scales, the squared error against the decoded weights, and the energy of those.
    """
    decoded = decode(packed, scales, stored, reciprocal=reciprocal)
    old_factor, new_factor = _factor(stored, reciprocal), _factor(target, reciprocal)
    new_packed, new_scales = np.empty_like(packed), np.empty_like(scales)
    encode_into(decoded, "F32", ScaleRule.SWEEP, new_factor, new_packed, new_scales)
    old_mantissa, old_exponent = math.frexp(stored)
    new_mantissa, new_exponent = math.frexp(target)
    if old_mantissa == new_mantissa:
        shift = new_exponent - old_exponent if reciprocal else old_exponent - new_exponent
        wanted = np.ldexp(E4M3_VALUES[scales], shift)
        exact_scales = round_to_e4m3(wanted)
        exact = E4M3_VALUES[exact_scales] == wanted
        new_scales[exact] = exact_scales[exact]
        blocks = new_packed.reshape(*scales.shape, BLOCK_SIZE // 2)
        blocks[exact] = packed.reshape(blocks.shape)[exact]
    assert old_factor <= new_factor, "the shared tensor scale is the largest, so that no block scale overflows"
    difference = decoded - decode(new_packed, new_scales, target, reciprocal=reciprocal)
    error = float(np.square(difference, dtype=np.float64).sum())
    return new_packed, new_scales, error, float(np.square(decoded, dtype=np.float64).sum())


def decode(packed: UInt8Array, scales: UInt8Array, stored: np.float32, *, reciprocal: bool) -> Float32Array:
    """The float32 weights of some rows."""
    decoded = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.float32)
    decode_into(packed, effective_scale(scales, stored, reciprocal=reciprocal), decoded)
    return decoded


def _factor(stored: np.float32, reciprocal: bool) -> np.float32:
    return np.float32(1.0) / stored if reciprocal else stored
