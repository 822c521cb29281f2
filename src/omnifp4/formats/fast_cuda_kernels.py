"""Triton kernels of `fast_cuda`.

A thread holds the sixteen values of a block in sixteen registers, so that sums over a block run in the order of
`fast_cpu` and give the same bits. The kernels must be launched with ``enable_fp_fusion=False``: products and sums are
fused exactly where the source says so.
"""

# Triton infers these types itself, and its decorator hides them from a checker.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

MAX_RULE = 0
FOUR_RULE = 1
SWEEP_RULE = 2


@triton.jit
def e2m1_rounder(y):
    """1.5 * 2**22 times the power of two under max(y, 1); see `fast_cpu_kernels.e2m1_rounder`."""
    power = tl.maximum(y, 1.0).to(tl.uint32, bitcast=True) & 0x7F800000
    return power.to(tl.float32, bitcast=True) * 6291456.0


@triton.jit
def power_under(y):
    """The power of two under max(y, 1)."""
    return (tl.maximum(y, 1.0).to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_value(code):
    """The value of non-negative finite E4M3 bits."""
    return (code << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def round_scale(amax, divisor):
    """E4M3 bits nearest to amax / divisor, ties to even, held within [2**-9, 448]: int32."""
    value = tl.minimum(tl.div_rn(amax, divisor), 448.0)
    power = tl.maximum(value, 0.015625).to(tl.uint32, bitcast=True) & 0x7F800000
    rounder = power.to(tl.float32, bitcast=True) * 1572864.0
    steps = (value + rounder).to(tl.int32, bitcast=True) - rounder.to(tl.int32, bitcast=True)
    return tl.maximum(steps + ((power >> 23).to(tl.int32) - 121) * 8, 1)


@triton.jit
def split_sixteen(values, BLOCKS: tl.constexpr):
    """Sixteen ``[BLOCKS]`` tensors out of one of ``[BLOCKS * 16]``, the first value of each block first."""
    even, odd = tl.split(tl.reshape(values, (BLOCKS, 2, 2, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    a0, a8 = tl.split(tl.permute(a, (0, 2, 1)))
    b0, b8 = tl.split(tl.permute(b, (0, 2, 1)))
    c0, c8 = tl.split(tl.permute(c, (0, 2, 1)))
    d0, d8 = tl.split(tl.permute(d, (0, 2, 1)))
    v0, v4 = tl.split(a0)
    v8, v12 = tl.split(a8)
    v1, v5 = tl.split(b0)
    v9, v13 = tl.split(b8)
    v2, v6 = tl.split(c0)
    v10, v14 = tl.split(c8)
    v3, v7 = tl.split(d0)
    v11, v15 = tl.split(d8)
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15


@triton.jit
def scale_error(x, weight, scale, reciprocal, MAY_CLIP: tl.constexpr, WEIGHTED: tl.constexpr):
    """Squared error of each block under a scale; x and weight are sixteen ``[BLOCKS]`` tensors each."""
    error = tl.zeros_like(scale)
    for j in tl.static_range(16):
        y = x[j] * reciprocal
        if MAY_CLIP:
            y = tl.minimum(y, 6.0)
        power = power_under(y)
        rounded = tl.fma(power, -6291456.0, tl.fma(power, 6291456.0, y))
        difference = tl.fma(rounded, -scale, x[j])
        error = tl.fma(difference * weight[j] if WEIGHTED else difference, difference, error)
    return error


@triton.jit
def e2m1_code(value, x, scale, reciprocal, POWER_OF_TWO: tl.constexpr):
    """E2M1 code of value / scale, ties to even, sign bit kept: uint32.

    Args:
        value: source value.
        x: its magnitude in the unit of `scale`.
        scale: what it is divided by.
        reciprocal: correctly rounded 1 / scale.
        POWER_OF_TWO: nothing here can underflow, so that one step of Newton's method rounds the quotient correctly.
    """
    if POWER_OF_TWO:
        quotient = x * reciprocal
        y = tl.fma(tl.fma(quotient, -scale, x), reciprocal, quotient)
    else:
        y = tl.div_rn(x, scale)
    y = tl.minimum(y, 6.0)
    rounder = e2m1_rounder(y)
    steps = (y + rounder).to(tl.uint32, bitcast=True) - rounder.to(tl.uint32, bitcast=True)
    binade = (rounder.to(tl.uint32, bitcast=True) >> 23) - 149
    return (steps + binade + binade) | ((value.to(tl.uint32, bitcast=True) >> 28) & 8)


@triton.jit
def encode_kernel(
    weight_ptr,
    importance_ptr,
    tensor_scale_ptr,
    reciprocal_ptr,
    packed_ptr,
    block_scale_ptr,
    sums_ptr,
    blocks,
    row_size,
    RULE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Encode BLOCKS blocks of one matrix.

    Args:
        weight_ptr: ``[E, blocks, 16]``, bfloat16, float16 or float32.
        importance_ptr: float32, one row of `row_size` values, or as many as a matrix has where `row_size` is 0.
        tensor_scale_ptr: float32 ``[E]``.
        reciprocal_ptr: float32 ``[127]``, correctly rounded reciprocals of the E4M3 numbers.
        packed_ptr: uint32 ``[E, blocks, 2]``.
        block_scale_ptr: uint8 ``[E, blocks]``.
        sums_ptr: float64 ``[E, programs, 2]``, squared error and energy in units of tensor_scale squared.
    """
    matrix = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    value = tl.program_id(0).to(tl.int64) * (BLOCKS * 16) + tl.arange(0, BLOCKS * 16)
    inside = value < blocks.to(tl.int64) * 16
    wide = tl.load(weight_ptr + matrix * blocks * 16 + value, mask=inside, other=0.0).to(tl.float32)
    values = split_sixteen(wide, BLOCKS)
    tensor_scale = tl.load(tensor_scale_ptr + matrix)
    unit = tl.div_rn(1.0, tensor_scale)

    x = ()
    amax = tl.zeros((BLOCKS,), tl.float32)
    energy = tl.zeros((BLOCKS,), tl.float32)
    for j in tl.static_range(16):
        magnitude = tl.abs(values[j])
        scaled = magnitude * unit if POWER_OF_TWO else tl.div_rn(magnitude, tensor_scale)
        x = x + (scaled,)  # noqa: RUF005 (Triton knows no starred tuple)
        amax = tl.maximum(amax, magnitude)
        energy = energy + scaled * scaled

    weight = x
    if WEIGHTED:
        source = value % row_size if row_size else value
        importance = split_sixteen(tl.load(importance_ptr + source, mask=inside, other=1.0), BLOCKS)
        largest = tl.zeros((BLOCKS,), tl.float32)
        for j in tl.static_range(16):
            largest = tl.maximum(largest, importance[j])
        weight = ()
        for j in tl.static_range(16):
            share = tl.where(largest > 0.0, tl.div_rn(importance[j], tl.where(largest > 0.0, largest, 1.0)), 1.0)
            weight = weight + (share,)  # noqa: RUF005

    by_max = round_scale(amax, tensor_scale * 6.0)
    best = by_max
    best_error = tl.full((BLOCKS,), float("inf"), tl.float32)
    if RULE == 2:
        for offset in tl.static_range(-3, 8):
            code = tl.minimum(tl.maximum(by_max + offset, 1), 126)
            error = scale_error(x, weight, e4m3_value(code), tl.load(reciprocal_ptr + code), offset < 1, WEIGHTED)
            wins = error < best_error
            if offset > 0:
                wins = wins & (by_max < 126)
            best = tl.where(wins, code, best)
            best_error = tl.where(wins, error, best_error)
    if RULE == 1:
        for divisor in tl.static_range(6, 2, -2):
            code = round_scale(amax, tensor_scale * divisor)
            error = scale_error(x, weight, e4m3_value(code), tl.load(reciprocal_ptr + code), True, WEIGHTED)
            wins = error < best_error
            best = tl.where(wins, code, best)
            best_error = tl.where(wins, error, best_error)
    scale = e4m3_value(best)
    reciprocal = tl.load(reciprocal_ptr + best)
    if RULE == 0 or WEIGHTED:
        best_error = scale_error(x, weight, scale, reciprocal, True, False)

    low = tl.zeros((BLOCKS,), tl.uint32)
    high = tl.zeros((BLOCKS,), tl.uint32)
    divisor = scale if POWER_OF_TWO else scale * tensor_scale
    for j in tl.static_range(8):
        dividend = x[j] if POWER_OF_TWO else tl.abs(values[j])
        low |= e2m1_code(values[j], dividend, divisor, reciprocal, POWER_OF_TWO) << (4 * j)
        dividend = x[j + 8] if POWER_OF_TWO else tl.abs(values[j + 8])
        high |= e2m1_code(values[j + 8], dividend, divisor, reciprocal, POWER_OF_TWO) << (4 * j)
    first = matrix * blocks + block
    tl.store(block_scale_ptr + first, best.to(tl.uint8), mask=block < blocks)
    pair = tl.arange(0, 2)
    target = packed_ptr + first[:, None] * 2 + pair[None, :]
    tl.store(target, tl.join(low, high), mask=(block < blocks)[:, None])
    sums = sums_ptr + (matrix * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(sums, tl.sum(best_error.to(tl.float64)))
    tl.store(sums + 1, tl.sum(energy.to(tl.float64)))


@triton.jit
def decode_kernel(packed_ptr, scale_ptr, out_ptr, size, BYTES: tl.constexpr):
    """out[2 i], out[2 i + 1] = the codes of byte i times scale[i // 8], in the type of `out_ptr`."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    codes = tl.load(packed_ptr + byte, mask=byte < size, other=0).to(tl.uint32)
    scale = tl.load(scale_ptr + byte // 8, mask=byte < size, other=0.0)
    both = tl.join(codes & 15, codes >> 4)
    magnitude = both & 7
    normal = ((magnitude + 252) << 22).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    signed = (value.to(tl.uint32, bitcast=True) | ((both & 8) << 28)).to(tl.float32, bitcast=True)
    product = (signed * scale[:, None]).to(out_ptr.dtype.element_ty)
    target = out_ptr + byte[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(target, product, mask=(byte < size)[:, None])
