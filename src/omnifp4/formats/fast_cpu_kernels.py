"""Compiled loops of `fast_cpu`: scan, encode, decode, compare.

One call is one thread, nothing is allocated inside a loop, and no instruction is specific to a machine. Every float
operation is one IEEE operation in the order written, so that a checkpoint encoded on one machine has the same bytes
on any other, however wide its vectors are.

The loops work on panels of `LANES` blocks, transposed to ``[16, LANES]``: a vector register then holds one value of
each of many blocks, sums over a block need no shuffles, and the compiler vectorises the loop over blocks at the
machine's own width. ``x`` is a magnitude in units of the tensor scale and ``y`` one in units of the whole scale.

All of it is one file, because numba's cache on disk notices a change in the file of the cached function alone: were a
loop it calls in another file, an edit there would go on running as it was.
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

MAX_RULE, FOUR_RULE, SWEEP_RULE = 0, 1, 2
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
E4M3_ROUNDER = f32(1.5 * 2.0**20)
"""A power of two times this, added and subtracted, rounds to multiples of its eighth: the step of E4M3."""
E4M3_MIN_NORMAL = f32(2.0**-6)
F16_SHIFT = f32(2.0**112)

OPTIONS: Final[dict[str, Any]] = {"nogil": True, "error_model": "numpy"}
ENTRY: Final[dict[str, Any]] = {**OPTIONS, "cache": True}


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


@njit(**ENTRY)
def transpose_bits(source, target):
    """target[i, j] = source[j, i], by tiles that fit the first-level cache."""
    columns, rows = source.shape
    for first_row in range(0, rows, 64):
        for first_column in range(0, columns, 64):
            for i in range(first_row, min(first_row + 64, rows)):
                for j in range(first_column, min(first_column + 64, columns)):
                    target[i, j] = source[j, i]


@njit(**ENTRY)
def largest_magnitude_bits_16(bits):
    largest = u16(0)
    for i in range(bits.size):
        magnitude = u16(bits[i] & u16(0x7FFF))
        largest = magnitude if magnitude > largest else largest
    return largest


@njit(**ENTRY)
def largest_magnitude_bits_32(bits):
    largest = u32(0)
    for i in range(bits.size):
        magnitude = u32(bits[i] & MAGNITUDE_MASK)
        largest = magnitude if magnitude > largest else largest
    return largest


@njit(**ENTRY)
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


@njit(**OPTIONS)
def scale_panel(signed, tensor_scale, x, amax, energy):
    """x = abs(signed) / tensor_scale; the largest magnitude of each block; add its energy, in units of x."""
    reciprocal = f32(1.0) / tensor_scale
    if (float_bits(tensor_scale) & u32(0x007FFFFF)) == u32(0):
        # A power of two: multiplying is as exact as dividing, and faster.
        for i in range(PANEL):
            x[i] = abs(signed[i]) * reciprocal
    else:
        for i in range(PANEL):
            x[i] = abs(signed[i]) / tensor_scale
    for i in range(LANES):
        largest = f32(0.0)
        total = f32(0.0)
        for j in range(16):
            magnitude = abs(signed[j * LANES + i])
            largest = magnitude if magnitude > largest else largest
            total += x[j * LANES + i] * x[j * LANES + i]
        amax[i] = largest
        energy[i] += f64(total)


@njit(**OPTIONS)
def round_scales(amax, divisor, code):
    """code[i] = E4M3 bits nearest to amax[i] / divisor, ties to even, held within [2**-9, 448]."""
    for i in range(LANES):
        value = amax[i] / divisor
        value = f32(448.0) if value > f32(448.0) else value
        normal = E4M3_MIN_NORMAL if value < E4M3_MIN_NORMAL else value
        power = u32(float_bits(normal) & EXPONENT_MASK)
        rounder = bits_float(power) * E4M3_ROUNDER
        steps = i32(float_bits(value + rounder)) - i32(float_bits(rounder))
        bits = i32(steps + (i32(power >> u32(23)) - i32(121)) * i32(8))
        code[i] = max(bits, i32(1))


@njit(**OPTIONS)
def try_scale(x, code, best_error, best_code):
    """Keep code[i] as block i's scale where its squared error is less than best_error[i]."""
    for i in range(LANES):
        bits = code[i]
        scale = e4m3_value(bits)
        reciprocal = f32(1.0) / scale
        error = f32(0.0)
        for j in range(16):
            value = x[j * LANES + i]
            y = value * reciprocal
            y = f32(6.0) if y > f32(6.0) else y
            rounder = e2m1_rounder(y)
            difference = fused((y + rounder) - rounder, -scale, value)
            error = fused(difference, difference, error)
        wins = error < best_error[i]
        best_error[i] = error if wins else best_error[i]
        best_code[i] = bits if wins else best_code[i]


@njit(**OPTIONS)
def try_larger_scale(x, centre, offset, best_error, best_code):
    """`try_scale` of centre[i] + offset for offset > 0, where no value can be beyond 6."""
    for i in range(LANES):
        middle = centre[i]
        code = i32(middle + i32(offset))
        code = i32(126) if code > i32(126) else code
        scale = e4m3_value(code)
        reciprocal = f32(1.0) / scale
        error = f32(0.0)
        for j in range(16):
            value = x[j * LANES + i]
            y = value * reciprocal
            rounder = e2m1_rounder(y)
            difference = fused((y + rounder) - rounder, -scale, value)
            error = fused(difference, difference, error)
        # A scale of 448 that was the centre already may clip; its error is known from there.
        wins = (error < best_error[i]) & (middle < i32(126))
        best_error[i] = error if wins else best_error[i]
        best_code[i] = code if wins else best_code[i]


@njit(**OPTIONS)
def try_scale_weighted(x, weight, code, best_error, best_code):
    """`try_scale` with each squared difference weighed: weight float32 ``[16, LANES]``."""
    for i in range(LANES):
        bits = code[i]
        scale = e4m3_value(bits)
        reciprocal = f32(1.0) / scale
        error = f32(0.0)
        for j in range(16):
            value = x[j * LANES + i]
            y = value * reciprocal
            y = f32(6.0) if y > f32(6.0) else y
            rounder = e2m1_rounder(y)
            difference = fused((y + rounder) - rounder, -scale, value)
            error = fused(difference * weight[j * LANES + i], difference, error)
        wins = error < best_error[i]
        best_error[i] = error if wins else best_error[i]
        best_code[i] = bits if wins else best_code[i]


@njit(**OPTIONS)
def load_importance(importance, start, count, row_size, weight):
    """weight[j, i] = the importance of value j of block i, in units of the block's largest; 1 where all are zero."""
    for i in range(count // 16):
        first = start + 16 * i
        if row_size:
            first %= row_size
        block = importance[first : first + 16]
        largest = f32(0.0)
        for j in range(16):
            largest = block[j] if block[j] > largest else largest
        for j in range(16):
            weight[j * LANES + i] = block[j] / largest if largest > f32(0.0) else f32(1.0)


@njit(**OPTIONS)
def e2m1_code(value, scale):
    """E2M1 code of value / scale, ties to even, sign bit kept: uint32."""
    y = abs(value) / scale
    y = f32(6.0) if y > f32(6.0) else y
    rounder = e2m1_rounder(y)
    # Steps above the binade's rounder, and two codes more for each binade above the first.
    steps = u32(float_bits(y + rounder) - float_bits(rounder))
    binade = u32((float_bits(rounder) >> u32(23)) - u32(149))
    sign = u32((float_bits(value) >> u32(28)) & u32(8))
    return u32(u32(steps + binade + binade) | sign)


@njit(**OPTIONS)
def pack_panel(signed, code, tensor_scale, words):
    """words[i, :] = the 16 codes of block i under its scale, as two uint32, the first value lowest."""
    for i in range(LANES):
        scale = e4m3_value(code[i]) * tensor_scale
        low, high = u32(0), u32(0)
        for j in range(8):
            low = u32(low | u32(e2m1_code(signed[j * LANES + i], scale) << u32(4 * j)))
            high = u32(high | u32(e2m1_code(signed[(j + 8) * LANES + i], scale) << u32(4 * j)))
        words[2 * i] = low
        words[2 * i + 1] = high


@njit(**OPTIONS)
def choose_scales(x, amax, rule, tensor_scale, by_max, candidate, best_error, best_code):
    """The scales that `rule` picks, and the squared error of each block in units of tensor_scale squared."""
    round_scales(amax, f32(6.0) * tensor_scale, by_max)
    for i in range(LANES):
        best_error[i] = f32(np.inf)
        best_code[i] = by_max[i]
    if rule == SWEEP_RULE:
        for offset in range(-3, 1):
            for i in range(LANES):
                candidate[i] = max(i32(by_max[i] + i32(offset)), i32(1))
            try_scale(x, candidate, best_error, best_code)
        for offset in range(1, 8):
            try_larger_scale(x, by_max, offset, best_error, best_code)
    else:
        try_scale(x, by_max, best_error, best_code)
        if rule == FOUR_RULE:
            round_scales(amax, f32(4.0) * tensor_scale, candidate)
            try_scale(x, candidate, best_error, best_code)


@njit(**OPTIONS)
def choose_scales_weighted(x, amax, weight, rule, tensor_scale, by_max, candidate, best_error, best_code):
    """`choose_scales` with weighed errors; best_error is then the error without weights."""
    round_scales(amax, f32(6.0) * tensor_scale, by_max)
    for i in range(LANES):
        best_error[i] = f32(np.inf)
        best_code[i] = by_max[i]
    if rule == SWEEP_RULE:
        for offset in range(-3, 8):
            for i in range(LANES):
                candidate[i] = min(max(i32(by_max[i] + i32(offset)), i32(1)), i32(126))
            try_scale_weighted(x, weight, candidate, best_error, best_code)
    elif rule == FOUR_RULE:
        try_scale_weighted(x, weight, by_max, best_error, best_code)
        round_scales(amax, f32(4.0) * tensor_scale, candidate)
        try_scale_weighted(x, weight, candidate, best_error, best_code)
    for i in range(LANES):
        best_error[i] = f32(np.inf)
        candidate[i] = best_code[i]
    try_scale(x, candidate, best_error, best_code)


@njit(**ENTRY)
def encode_blocks(bits, kind, rule, tensor_scale, importance, row_size, packed, block_scale):
    """Encode flat source bits; see `fast_cpu.encode_into`.

    Args:
        importance: float32, flat; empty for none.
        row_size: its size where one row of it serves all rows, otherwise 0.

    Returns:
        (squared error, energy, largest magnitude), the first two in units of tensor_scale squared.
    """
    staging, signed, x = np.empty(PANEL, bits.dtype), np.empty(PANEL, f32), np.empty(PANEL, f32)
    words, weight = np.empty(2 * LANES, u32), np.ones(PANEL, f32)
    staging_words, words_bytes = staging.view(u64), words.view(u8)
    amax, best_error = np.empty(LANES, f32), np.empty(LANES, f32)
    by_max, candidate, best_code = np.empty(LANES, i32), np.empty(LANES, i32), np.empty(LANES, i32)
    error_sum, energy_sum = np.zeros(LANES, f64), np.zeros(LANES, f64)
    largest = f32(0.0)
    for start in range(0, bits.size, PANEL):
        count = min(PANEL, bits.size - start)
        load_panel(bits, start, count, kind, staging, staging_words, signed)
        scale_panel(signed, tensor_scale, x, amax, energy_sum)
        if importance.size:
            load_importance(importance, start, count, row_size, weight)
            choose_scales_weighted(x, amax, weight, rule, tensor_scale, by_max, candidate, best_error, best_code)
        else:
            choose_scales(x, amax, rule, tensor_scale, by_max, candidate, best_error, best_code)
        pack_panel(signed, best_code, tensor_scale, words)
        packed_target = packed[start // 2 : (start + count) // 2]
        for i in range(count // 2):
            packed_target[i] = words_bytes[i]
        scale_target = block_scale[start // 16 : (start + count) // 16]
        for i in range(count // 16):
            scale_target[i] = u8(best_code[i])
        for i in range(LANES):
            error_sum[i] += f64(best_error[i])
            largest = amax[i] if amax[i] > largest else largest
    return error_sum.sum(), energy_sum.sum(), largest


@njit(**ENTRY)
def energy(bits, kind):
    """Sum of squares of source values in float64."""
    staging, signed = np.empty(PANEL, bits.dtype), np.empty(PANEL, f32)
    words = staging.view(u64)
    total = f64(0.0)
    for start in range(0, bits.size, PANEL):
        load_panel(bits, start, min(PANEL, bits.size - start), kind, staging, words, signed)
        for i in range(PANEL):
            total += f64(signed[i]) * f64(signed[i])
    return total


@njit(**OPTIONS)
def e2m1_value(code):
    """The value of an E2M1 code 0..15."""
    magnitude = u32(code & u32(7))
    # The bits of 1.0 are those of code 2 under this shift; codes 0 and 1 are below the smallest normal number.
    value = float_bits(f32(magnitude) * f32(0.5)) if magnitude < u32(2) else u32((magnitude + u32(252)) << u32(22))
    return bits_float(u32(value | u32(u32(code & u32(8)) << u32(28))))


@njit(**OPTIONS)
def narrow_bf16(value):
    """BF16 bits of a float32, nearest, ties to even; NaN stays NaN: uint32."""
    bits = float_bits(value)
    rounded = u32(u32(bits + u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1))) >> u32(16))
    quiet = u32(u32(bits >> u32(16)) | u32(0x40))
    return quiet if u32(bits & MAGNITUDE_MASK) > EXPONENT_MASK else rounded


@njit(**ENTRY)
def narrow_bf16_array(values, bits):
    for i in range(values.size):
        bits[i] = u16(narrow_bf16(values[i]))


@njit(**OPTIONS)
def unpack_panel(packed, scale, start, count, staging, words, factor, decoded):
    """decoded[j, i] = value j of block i of the panel at value `start`; zeros behind its `count` values.

    Args:
        packed, scale: of the whole tensor, flat; a float32 scale for every 8 bytes.
        staging: uint8 for a panel's codes, seen as uint32 through `words`.
        factor: float32 for a panel's scales.
    """
    source = packed[start // 2 : (start + count) // 2]
    for i in range(source.size):
        staging[i] = source[i]
    for i in range(count // 16):
        factor[i] = scale[start // 16 + i]
    for i in range(count // 16, LANES):
        factor[i] = f32(0.0)
    for i in range(source.size, PANEL // 2):
        staging[i] = u8(0)
    for i in range(LANES):
        low, high, product = words[2 * i], words[2 * i + 1], factor[i]
        for j in range(8):
            decoded[j * LANES + i] = e2m1_value(u32(u32(low >> u32(4 * j)) & u32(15))) * product
            decoded[(j + 8) * LANES + i] = e2m1_value(u32(u32(high >> u32(4 * j)) & u32(15))) * product


@njit(**ENTRY)
def decode_float32(packed, scale, out):
    staging, decoded, natural = np.empty(PANEL // 2, u8), np.empty(PANEL, f32), np.empty(PANEL // 2, u64)
    factor, words, values = np.zeros(LANES, f32), staging.view(u32), natural.view(f32)
    for start in range(0, out.size, PANEL):
        count = min(PANEL, out.size - start)
        unpack_panel(packed, scale, start, count, staging, words, factor, decoded)
        for i in range(LANES):
            for j in range(8):
                low, high = float_bits(decoded[2 * j * LANES + i]), float_bits(decoded[(2 * j + 1) * LANES + i])
                natural[i * 8 + j] = u64(low) | (u64(high) << u64(32))
        target = out[start : start + count]
        for i in range(count):
            target[i] = values[i]


@njit(**ENTRY)
def decode_bf16(packed, scale, out):
    staging, decoded, natural = np.empty(PANEL // 2, u8), np.empty(PANEL, f32), np.empty(PANEL // 4, u64)
    factor, words, values = np.zeros(LANES, f32), staging.view(u32), natural.view(u16)
    for start in range(0, out.size, PANEL):
        count = min(PANEL, out.size - start)
        unpack_panel(packed, scale, start, count, staging, words, factor, decoded)
        for i in range(LANES):
            for j in range(4):
                word = u64(0)
                for k in range(4):
                    word |= u64(narrow_bf16(decoded[(4 * j + k) * LANES + i])) << u64(16 * k)
                natural[i * 4 + j] = word
        target = out[start : start + count]
        for i in range(count):
            target[i] = values[i]


@njit(**OPTIONS)
def compare_panel(signed, decoded, error, energy, swapped, largest):
    """Sums of each block in float64, and the largest error of each."""
    for i in range(LANES):
        error_sum, energy_sum, swapped_sum = f64(0.0), f64(0.0), f64(0.0)
        worst = f32(0.0)
        for j in range(8):
            even, odd = signed[2 * j * LANES + i], signed[(2 * j + 1) * LANES + i]
            low, high = decoded[2 * j * LANES + i], decoded[(2 * j + 1) * LANES + i]
            a, b = abs(even - low), abs(odd - high)
            worst = a if a > worst else worst
            worst = b if b > worst else worst
            error_sum += f64(a) * f64(a) + f64(b) * f64(b)
            energy_sum += f64(even) * f64(even) + f64(odd) * f64(odd)
            a, b = even - high, odd - low
            swapped_sum += f64(a) * f64(a) + f64(b) * f64(b)
        error[i], energy[i], swapped[i], largest[i] = error_sum, energy_sum, swapped_sum, worst


@njit(**OPTIONS)
def all_finite(sums):
    broken = 0
    for i in range(LANES):
        broken |= 0 if np.isfinite(sums[i]) else 1
    return broken == 0


@njit(**OPTIONS)
def drop_nonfinite(signed, decoded):
    """Zero the pairs of values that are not both finite; how many there were."""
    dropped = 0
    for i in range(PANEL):
        if not (np.isfinite(signed[i]) and np.isfinite(decoded[i])):
            signed[i] = f32(0.0)
            decoded[i] = f32(0.0)
            dropped += 1
    return dropped


@njit(**ENTRY)
def compare_blocks(bits, kind, packed, scale):
    """Dequantize and compare; see `fast_cpu.compare`."""
    staging, signed, decoded = np.empty(PANEL, bits.dtype), np.empty(PANEL, f32), np.empty(PANEL, f32)
    bytes_staging = np.empty(PANEL // 2, u8)
    factor = np.zeros(LANES, f32)
    words, code_words = staging.view(u64), bytes_staging.view(u32)
    error, energy, swapped = np.empty(LANES, f64), np.empty(LANES, f64), np.empty(LANES, f64)
    error_sum, energy_sum, swapped_sum = np.zeros(LANES, f64), np.zeros(LANES, f64), np.zeros(LANES, f64)
    largest, largest_error = np.empty(LANES, f32), np.zeros(LANES, f32)
    nonfinite = 0
    for start in range(0, bits.size, PANEL):
        count = min(PANEL, bits.size - start)
        load_panel(bits, start, count, kind, staging, words, signed)
        unpack_panel(packed, scale, start, count, bytes_staging, code_words, factor, decoded)
        compare_panel(signed, decoded, error, energy, swapped, largest)
        if not (all_finite(error) and all_finite(energy) and all_finite(swapped)):
            nonfinite += drop_nonfinite(signed, decoded)
            compare_panel(signed, decoded, error, energy, swapped, largest)
        for i in range(LANES):
            error_sum[i] += error[i]
            energy_sum[i] += energy[i]
            swapped_sum[i] += swapped[i]
            largest_error[i] = largest[i] if largest[i] > largest_error[i] else largest_error[i]
    return error_sum.sum(), energy_sum.sum(), swapped_sum.sum(), largest_error.max(), nonfinite
