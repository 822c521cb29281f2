"""Triton kernels of `fast_cuda`.

A thread holds the sixteen values of a block in sixteen registers, so that sums over a block run in the order of
`fast_cpu` and give the same bits. The kernels must be launched with ``enable_fp_fusion=False``: products and sums are
fused exactly where the source says so.

The sweep is bound by the instructions it issues, and most of them round and compare under a candidate. For BF16 under
a tensor scale that is a power of two, `halved_error` does that in float16, two values an instruction, and still gives
the bits of `scale_error`:

- A magnitude x then has 8 significant bits, and half-way between two E2M1 values times an E4M3 scale there is a number
  of at most 7. So x lies on such a midpoint or at least one part in 256 away from it, and a quotient with float16's
  error of one part in 1024 lands on the right side.
- On a midpoint both neighbours err by exactly the same, so that it does not matter which of them a tie gives.
- x minus a scaled E2M1 value has at most 11 bits, so that float16 holds it exactly.
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
def fits_halves(x, by_max):
    """Whether `halved_error` may serve all blocks around the scales `by_max`: a scalar.

    Float16 holds 8 bits from 2**-17 on, and zero. Around a scale short of the largest, no value is beyond 27 times any
    candidate, so that nothing overflows.
    """
    # Less one, the bits of zero are the largest of all.
    least = tl.full(by_max.shape, 0x7FFFFFFF, tl.uint32)
    for j in tl.static_range(16):
        least = tl.minimum(least, x[j].to(tl.uint32, bitcast=True) - 1)
    least_that_fits = 0x37000000 - 1
    return tl.max(((least < least_that_fits) | (by_max >= 126)).to(tl.int32)) == 0


@triton.jit
def halved_error(pairs, code, reciprocal, MAY_CLIP: tl.constexpr):
    """`scale_error` in float16 but for the sums.

    With c = 513 y, float16 holds c - y to multiples of the step of E2M1 at y, so that c - (c - y) is y rounded; with
    c = 513 at least, it does so below 1 too.

    Args:
        pairs: eight float16 tensors ``[BLOCKS, 2]``, values j and j + 8 of each block; see `fits_halves`.
        code: E4M3 bits of the scale.
        reciprocal: float16 of 1 / 16 over the scale. The sixteenth keeps 513 times it within float16.
        MAY_CLIP: a value may be beyond 7 times the scale. Up to there it rounds to 6, or to 8 from 7 itself, which
            errs by as much.
    """
    # E4M3 bits shifted to float16's exponent and mantissa give the value over 256; times -16 is wanted.
    step = (code << 7).to(tl.uint16).to(tl.float16, bitcast=True) * tl.full(code.shape, -4096.0, tl.float16)
    spread = reciprocal * tl.full(code.shape, 513.0, tl.float16)
    step, spread, down = tl.join(step, step), tl.join(spread, spread), tl.join(-reciprocal, -reciprocal)
    floor = tl.full(step.shape, 32.0625, tl.float16)
    error = tl.zeros(code.shape, tl.float32)
    later = ()
    for j in tl.static_range(8):
        raised = tl.maximum(pairs[j] * spread, floor)
        rounded = raised - tl.fma(pairs[j], down, raised)
        if MAY_CLIP:
            rounded = tl.minimum(rounded, tl.full(step.shape, 0.375, tl.float16))
        first, second = tl.split(tl.fma(rounded, step, pairs[j]))
        error = tl.fma(first.to(tl.float32), first.to(tl.float32), error)
        later = later + (second.to(tl.float32),)  # noqa: RUF005 (Triton knows no starred tuple)
    for j in tl.static_range(8):
        error = tl.fma(later[j], later[j], error)
    return error


@triton.jit
def halved_code(value, x, reciprocal):
    """`e2m1_code` for what `halved_error` is for, and any x.

    Times 2**-126, the E2M1 numbers are float32's of one mantissa bit, subnormal ones included, so that a code is the
    rounded head of the bits. The quotient of a midpoint may be off in its last bit; every other is 2**11 and more of
    them away from it. So a tie is recognised within 255 bits, and goes to the even code.
    """
    bits = (tl.minimum(x * reciprocal, 6.0) * 1.1754943508222875e-38).to(tl.uint32, bitcast=True)
    code = (bits + (0x200000 - 0x100) + ((bits >> 13) & 0x200)) >> 22
    return code | ((value.to(tl.uint32, bitcast=True) >> 28) & 8)


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
    half_reciprocal_ptr,
    packed_ptr,
    block_scale_ptr,
    sums_ptr,
    blocks,
    row_size,
    RULE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Encode BLOCKS blocks of one matrix.

    Args:
        weight_ptr: ``[E, blocks, 16]``, bfloat16, float16 or float32.
        importance_ptr: float32, one row of `row_size` values, or as many as a matrix has where `row_size` is 0.
        tensor_scale_ptr: float32 ``[E]``.
        reciprocal_ptr: float32 ``[127]``, correctly rounded reciprocals of the E4M3 numbers.
        half_reciprocal_ptr: float16 ``[127]``, those over 16.
        packed_ptr: uint32 ``[E, blocks, 2]``.
        block_scale_ptr: uint8 ``[E, blocks]``.
        sums_ptr: float64 ``[E, programs, 2]``, squared error and energy in units of tensor_scale squared.
        HALVES: the sweep of bfloat16 without importance under powers of two.
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
        energy = tl.fma(scaled, scaled, energy)

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
    fits = False
    if HALVES:
        fits = fits_halves(x, by_max)
    if fits:
        pairs = ()
        for j in tl.static_range(8):
            pairs = pairs + (tl.join(x[j].to(tl.float16), x[j + 8].to(tl.float16)),)  # noqa: RUF005
        for offset in tl.static_range(-3, 8):
            code = tl.minimum(tl.maximum(by_max + offset, 1), 126)
            # The two smallest scales may clip even as the nearest to a sixth of the largest value.
            error = halved_error(pairs, code, tl.load(half_reciprocal_ptr + code), offset < 1)
            wins = error < best_error
            best = tl.where(wins, code, best)
            best_error = tl.where(wins, error, best_error)
    elif RULE == 2:
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
        if HALVES:
            low |= halved_code(values[j], x[j], reciprocal) << (4 * j)
            high |= halved_code(values[j + 8], x[j + 8], reciprocal) << (4 * j)
        else:
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
    # Few enough blocks for float32; the many programs are summed in float64.
    tl.store(sums, tl.sum(best_error).to(tl.float64))
    tl.store(sums + 1, tl.sum(energy).to(tl.float64))


@triton.jit
def magnitude_kernel(bits_ptr, largest_ptr, size, MASK: tl.constexpr, VALUES: tl.constexpr):
    """largest[matrix] = the largest of its source bits under MASK; both are int32 or narrower, `largest` starts at 0.

    NaN and infinity have larger bits than any other magnitude, so that the largest one tells of them.
    """
    matrix = tl.program_id(1).to(tl.int64)
    value = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    bits = tl.load(bits_ptr + matrix * size + value, mask=value < size, other=0) & MASK
    tl.atomic_max(largest_ptr + matrix, tl.max(bits).to(tl.int32))


@triton.jit
def sweep_scale_kernel(amax_ptr, scale_ptr, count, SCALES: tl.constexpr):
    """`reference.tensor_scale_for` under the sweep, for amax float32 ``[count]`` within its limit.

    Rounded up to a power of two, a 1536th of an amax is the power of two under it over 1024, or over 512 where the
    mantissa is above 1.5. To round the quotient first changes nothing, because one above a power of two stays above.
    """
    index = tl.program_id(0) * SCALES + tl.arange(0, SCALES)
    bits = tl.load(amax_ptr + index, mask=index < count, other=0.0).to(tl.int32, bitcast=True)
    scale = ((bits + 0x3FFFFF) & 0x7F800000) - (10 << 23)
    scale = tl.maximum(scale, (127 - 100) << 23).to(tl.float32, bitcast=True)
    # Up to 768 times float32's smallest number, the quotient is zero.
    tl.store(scale_ptr + index, tl.where(bits <= 768, 1.0, scale), mask=index < count)


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
