"""Compiled loops of `fast_cpu`, second part: choosing scales and encoding. See `fast_cpu_panels` for the layout."""

# Numba infers these types itself, and its decorators hide them from a checker.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit

from omnifp4.formats.fast_cpu_panels import (
    EXPONENT_MASK,
    LANES,
    OPTIONS,
    PANEL,
    bits_float,
    e2m1_rounder,
    e4m3_value,
    f32,
    f64,
    float_bits,
    fused,
    i32,
    load_panel,
    u8,
    u32,
    u64,
)

MAX_RULE, FOUR_RULE, SWEEP_RULE = 0, 1, 2

E4M3_ROUNDER = f32(1.5 * 2.0**20)
"""A power of two times this, added and subtracted, rounds to multiples of its eighth: the step of E4M3."""
E4M3_MIN_NORMAL = f32(2.0**-6)


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
def sweep_scales(x, centre, candidate, best_error, best_code):
    for offset in range(-3, 1):
        for i in range(LANES):
            candidate[i] = max(i32(centre[i] + i32(offset)), i32(1))
        try_scale(x, candidate, best_error, best_code)
    for offset in range(1, 8):
        try_larger_scale(x, centre, offset, best_error, best_code)


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
def encode_blocks(bits, kind, rule, tensor_scale, packed, block_scale):
    """Encode flat source bits; see `fast_cpu.encode_into`.

    Returns:
        (squared error, energy, largest x), the first two in units of tensor_scale squared.
    """
    staging, signed, x = np.empty(PANEL, bits.dtype), np.empty(PANEL, f32), np.empty(PANEL, f32)
    staging_words = staging.view(u64)
    words = np.empty(2 * LANES, u32)
    words_bytes = words.view(u8)
    amax, best_error = np.empty(LANES, f32), np.empty(LANES, f32)
    by_max, candidate, best_code = np.empty(LANES, i32), np.empty(LANES, i32), np.empty(LANES, i32)
    error_sum, energy_sum = np.zeros(LANES, f64), np.zeros(LANES, f64)
    largest = f32(0.0)
    for start in range(0, bits.size, PANEL):
        count = min(PANEL, bits.size - start)
        load_panel(bits, start, count, kind, staging, staging_words, signed)
        scale_panel(signed, tensor_scale, x, amax, energy_sum)
        round_scales(amax, f32(6.0) * tensor_scale, by_max)
        for i in range(LANES):
            best_error[i] = f32(np.inf)
            best_code[i] = by_max[i]
            largest = amax[i] if amax[i] > largest else largest
        if rule == SWEEP_RULE:
            sweep_scales(x, by_max, candidate, best_error, best_code)
        else:
            try_scale(x, by_max, best_error, best_code)
            if rule == FOUR_RULE:
                round_scales(amax, f32(4.0) * tensor_scale, candidate)
                try_scale(x, candidate, best_error, best_code)
        first_block = start // 16
        for i in range(count // 16):
            block_scale[first_block + i] = u8(best_code[i])
        for i in range(LANES):
            error_sum[i] += f64(best_error[i])
        pack_panel(signed, best_code, tensor_scale, words)
        target = packed[start // 2 : (start + count) // 2]
        for i in range(count // 2):
            target[i] = words_bytes[i]
    return error_sum.sum(), energy_sum.sum(), largest


@njit(**OPTIONS)
def encode_blocks_weighted(bits, kind, rule, tensor_scale, importance, row_size, packed, block_scale):
    """`encode_blocks` with an importance for every value.

    Args:
        importance: float32, flat.
        row_size: its size where one row of it serves all rows, otherwise 0.
    """
    staging, signed, x = np.empty(PANEL, bits.dtype), np.empty(PANEL, f32), np.empty(PANEL, f32)
    staging_words = staging.view(u64)
    words, weight = np.empty(2 * LANES, u32), np.ones(PANEL, f32)
    words_bytes = words.view(u8)
    amax, best_error, weighted_error = np.empty(LANES, f32), np.empty(LANES, f32), np.empty(LANES, f32)
    by_max, candidate, best_code = np.empty(LANES, i32), np.empty(LANES, i32), np.empty(LANES, i32)
    error_sum, energy_sum = np.zeros(LANES, f64), np.zeros(LANES, f64)
    largest = f32(0.0)
    for start in range(0, bits.size, PANEL):
        count = min(PANEL, bits.size - start)
        load_panel(bits, start, count, kind, staging, staging_words, signed)
        scale_panel(signed, tensor_scale, x, amax, energy_sum)
        load_importance(importance, start, count, row_size, weight)
        round_scales(amax, f32(6.0) * tensor_scale, by_max)
        for i in range(LANES):
            weighted_error[i] = f32(np.inf)
            best_code[i] = by_max[i]
            largest = amax[i] if amax[i] > largest else largest
        if rule == SWEEP_RULE:
            for offset in range(-3, 8):
                for i in range(LANES):
                    candidate[i] = min(max(i32(by_max[i] + i32(offset)), i32(1)), i32(126))
                try_scale_weighted(x, weight, candidate, weighted_error, best_code)
        elif rule == FOUR_RULE:
            try_scale_weighted(x, weight, by_max, weighted_error, best_code)
            round_scales(amax, f32(4.0) * tensor_scale, candidate)
            try_scale_weighted(x, weight, candidate, weighted_error, best_code)
        for i in range(LANES):
            best_error[i] = f32(np.inf)
            candidate[i] = best_code[i]
        try_scale(x, candidate, best_error, best_code)
        for i in range(count // 16):
            block_scale[start // 16 + i] = u8(best_code[i])
        for i in range(LANES):
            error_sum[i] += f64(best_error[i])
        pack_panel(signed, best_code, tensor_scale, words)
        target = packed[start // 2 : (start + count) // 2]
        for i in range(count // 2):
            target[i] = words_bytes[i]
    return error_sum.sum(), energy_sum.sum(), largest


@njit(**OPTIONS)
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
