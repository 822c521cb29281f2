"""Compiled loops of `fast_cpu`, first part: bits, numbers and panels.

One call is one thread, nothing is allocated inside a loop, and no instruction is specific to a machine. Every float
operation is one IEEE operation in the order written, so that a checkpoint encoded on one machine has the same bytes
on any other, however wide its vectors are.

The loops work on panels of `LANES` blocks, transposed to ``[16, LANES]``: a vector register then holds one value of
each of many blocks, sums over a block need no shuffles, and the compiler vectorises the loop over blocks at the
machine's own width. ``x`` is a magnitude in units of the tensor scale and ``y`` one in units of the whole scale.
"""

# Numba infers these types itself, and its decorators hide them from a checker.
# mypy: ignore-errors

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 128
"""Blocks in a panel: 8 KiB of float32, so that all of a panel's buffers stay in the first-level cache."""
PANEL = LANES * 16

BF16, F16, F32 = 0, 1, 2
"""Kinds of source values, as the loops know them; the bits come as uint16, uint16 and uint32."""

i32, u8, u16, u32, u64, f32, f64 = np.int32, np.uint8, np.uint16, np.uint32, np.uint64, np.float32, np.float64

EXPONENT_MASK = u32(0x7F800000)
MAGNITUDE_MASK = u32(0x7FFFFFFF)
ONE = u32(0x3F800000)
"""Bits of 1.0: for non-negative floats the larger bits are the larger number."""
E2M1_ROUNDER = u32((22 << 23) + 0x400000)
"""Added to the bits of a power of two, gives those of 1.5 * 2**22 times it."""
E4M3_SHIFT = f32(2.0**120)
"""E4M3 bits shifted to float32's exponent and mantissa give the value over this; subnormal ones too."""
F16_SHIFT = f32(2.0**112)

OPTIONS: Final[dict[str, Any]] = {"nogil": True, "cache": True, "error_model": "numpy"}


@intrinsic
def float_bits(typing_context, value):
    """The bits of a float32 as uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def bits_float(typing_context, bits):
    """The float32 with the given uint32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def fused(typing_context, a, b, c):
    """a * b + c in float32 with one rounding, on any machine."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@njit(**OPTIONS)
def e4m3_value(code):
    """The value of non-negative finite E4M3 bits."""
    return bits_float(u32(u32(code) << u32(20))) * E4M3_SHIFT


@njit(**OPTIONS)
def e2m1_rounder(y):
    """1.5 * 2**22 times the power of two under max(y, 1), for 0 <= y <= 6.

    Adding and subtracting it rounds y to a multiple of half that power of two: the step of E2M1 at y.
    """
    bits = float_bits(y)
    at_least_one = ONE if bits < ONE else bits
    return bits_float(u32(u32(at_least_one & EXPONENT_MASK) + E2M1_ROUNDER))


@njit(**OPTIONS)
def widen_bf16(bits):
    return bits_float(u32(u32(bits) << u32(16)))


@njit(**OPTIONS)
def widen_f16(bits):
    """The float32 of float16 bits; infinities and NaN stay what they are."""
    magnitude = bits_float(u32((u32(bits) & u32(0x7FFF)) << u32(13))) * F16_SHIFT
    special = u32(0x7F800000) if (u32(bits) & u32(0x7C00)) == u32(0x7C00) else u32(0)
    sign = u32((u32(bits) & u32(0x8000)) << u32(16))
    return bits_float(u32(float_bits(magnitude) | special | sign))


@njit(**OPTIONS)
def transpose_bits(source, target):
    """target[i, j] = source[j, i], by tiles that fit the first-level cache."""
    columns, rows = source.shape
    for first_row in range(0, rows, 64):
        for first_column in range(0, columns, 64):
            for i in range(first_row, min(first_row + 64, rows)):
                for j in range(first_column, min(first_column + 64, columns)):
                    target[i, j] = source[j, i]


@njit(**OPTIONS)
def largest_magnitude_bits_16(bits):
    largest = u16(0)
    for i in range(bits.size):
        magnitude = u16(bits[i] & u16(0x7FFF))
        largest = magnitude if magnitude > largest else largest
    return largest


@njit(**OPTIONS)
def largest_magnitude_bits_32(bits):
    largest = u32(0)
    for i in range(bits.size):
        magnitude = u32(bits[i] & MAGNITUDE_MASK)
        largest = magnitude if magnitude > largest else largest
    return largest


@njit(**OPTIONS)
def first_at_least(bits, threshold):
    """Index of the first value whose bits, without the sign, reach `threshold`; -1 if none."""
    mask = MAGNITUDE_MASK >> u32(32 - 8 * bits.itemsize)
    for i in range(bits.size):
        if (bits[i] & mask) >= threshold:
            return i
    return -1


@njit(**OPTIONS)
def load_panel(bits, start, count, kind, staging, words, signed):
    """signed[j, i] = value j of block i of the panel at `start`; zeros behind its `count` values.

    The panel goes through `staging`, of the type of `bits` and seen as uint64 through `words`, so that a value costs
    a quarter or a half of a load and a tensor may start at any byte of a file.
    """
    source = bits[start : start + count]
    for i in range(count):
        staging[i] = source[i]
    for i in range(count, PANEL):
        staging[i] = 0
    if kind == BF16:
        for i in range(LANES):
            for j in range(4):
                low, high = u32(words[i * 4 + j]), u32(words[i * 4 + j] >> u64(32))
                signed[(4 * j) * LANES + i] = bits_float(u32(low << u32(16)))
                signed[(4 * j + 1) * LANES + i] = bits_float(u32(low & u32(0xFFFF0000)))
                signed[(4 * j + 2) * LANES + i] = bits_float(u32(high << u32(16)))
                signed[(4 * j + 3) * LANES + i] = bits_float(u32(high & u32(0xFFFF0000)))
    elif kind == F16:
        for i in range(LANES):
            for j in range(4):
                low, high = u32(words[i * 4 + j]), u32(words[i * 4 + j] >> u64(32))
                signed[(4 * j) * LANES + i] = widen_f16(u32(low & u32(0xFFFF)))
                signed[(4 * j + 1) * LANES + i] = widen_f16(u32(low >> u32(16)))
                signed[(4 * j + 2) * LANES + i] = widen_f16(u32(high & u32(0xFFFF)))
                signed[(4 * j + 3) * LANES + i] = widen_f16(u32(high >> u32(16)))
    else:
        for i in range(LANES):
            for j in range(8):
                signed[(2 * j) * LANES + i] = bits_float(u32(words[i * 8 + j]))
                signed[(2 * j + 1) * LANES + i] = bits_float(u32(words[i * 8 + j] >> u64(32)))
