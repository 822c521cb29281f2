"""Compiled loops of `fast_cpu`, third part: decoding and comparing. See `fast_cpu_panels` for the layout."""

# Numba infers these types itself, and its decorators hide them from a checker.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit

from omnifp4.formats.fast_cpu_panels import (
    EXPONENT_MASK,
    LANES,
    MAGNITUDE_MASK,
    OPTIONS,
    PANEL,
    bits_float,
    f32,
    f64,
    float_bits,
    load_panel,
    u8,
    u16,
    u32,
    u64,
)


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


@njit(**OPTIONS)
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


@njit(**OPTIONS)
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


@njit(**OPTIONS)
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


@njit(**OPTIONS)
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
