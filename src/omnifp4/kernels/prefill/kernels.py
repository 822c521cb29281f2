"""Triton kernels of the prefill: unpacking, routing, the grouped product on packed weights, the mix.

The product takes weights as the left operand, ``[rows, depth] @ [depth, tokens]``, so that a GPU whose matrix unit
reads its left operand from registers (Hopper) never writes unpacked weights to shared memory. A byte holds two
columns: the low nibbles meet the even columns of x and the high nibbles the odd ones, so that nothing has to be
interleaved if x comes with its even columns first (`split_columns_kernel`).

Code times block scale has at most six significant bits: exact in bfloat16 and in float16. `unpacked` returns it times
2**-14, where neither type overflows or loses a bit; the tensor scale and 2**14 multiply the float32 sum.
"""

# Triton infers these types itself, and its decorator hides them from a checker.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies the bits of bfloat16 as if they were integers and misreads its subnormal numbers; there,
# products run in float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def e4m3_value(bits):
    """The values of E4M3 bits, float32; exact, NaN included."""
    wide = bits.to(tl.uint32)
    magnitude = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    magnitude = tl.where((wide & 0x7F) == 0x7F, float("nan"), magnitude)
    return (magnitude.to(tl.uint32, bitcast=True) | ((wide & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def dequantize_kernel(
    words_ptr,
    block_scale_ptr,
    tensor_scale_ptr,
    out_ptr,
    matrix_words,
    RECIPROCAL: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Unpack WORDS words of one matrix.

    Args:
        words_ptr: eight codes a word, int32 ``[E, matrix_words]``.
        block_scale_ptr: E4M3 bits ``[E, matrix_words / 2]``.
        tensor_scale_ptr: float32 ``[E]``.
        out_ptr: ``[E, matrix_words * 8]``.
    """
    matrix = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = word < matrix_words
    codes = tl.load(words_ptr + matrix * matrix_words + word, mask=inside, other=0).to(tl.uint32, bitcast=True)
    bits = tl.load(block_scale_ptr + matrix * (matrix_words // 2) + word // 2, mask=inside, other=0)
    tensor_scale = tl.load(tensor_scale_ptr + matrix)
    scale = tl.div_rn(e4m3_value(bits), tensor_scale) if RECIPROCAL else e4m3_value(bits) * tensor_scale
    column = tl.arange(0, 8)
    code = codes[:, None] >> (4 * column[None, :]).to(tl.uint32)
    # E2M1 bits at the head of float32's mantissa and exponent: the value times 2**-126, the subnormal one included.
    value = (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    target = out_ptr + matrix * matrix_words * 8 + (word * 8)[:, None].to(tl.int64) + column[None, :]
    tl.store(target, (value * scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def split_columns_kernel(x_ptr, out_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = the even columns of x[t], then the odd ones."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < COLUMNS // 2
    column = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
    both = tl.load(x_ptr + token * COLUMNS + column, mask=inside[:, None], other=0.0)
    even, odd = tl.split(both)
    tl.store(out_ptr + token * COLUMNS + pair, even, mask=inside)
    tl.store(out_ptr + token * COLUMNS + COLUMNS // 2 + pair, odd, mask=inside)


@triton.jit
def routed_expert(index_ptr, slot, slots, EXPERTS: tl.constexpr, NONE: tl.constexpr):
    """The expert of each slot; NONE for slots behind the last one and for those routed to no expert."""
    expert = tl.load(index_ptr + slot, mask=slot < slots, other=EXPERTS)
    return tl.where((expert >= 0) & (expert < EXPERTS), expert, NONE).to(tl.int32)


@triton.jit
def count_kernel(index_ptr, counts_ptr, slots, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """counts[chunk, e] = slots of the chunk that go to expert e: int32 ``[chunks, BINS]``."""
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = routed_expert(index_ptr, slot, slots, EXPERTS, BINS)
    bins = tl.arange(0, BINS)
    counts = tl.sum((expert[:, None] == bins[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + chunk * BINS + bins, counts)


@triton.jit
def scan_kernel(
    counts_ptr,
    begins_ptr,
    ends_ptr,
    tiles_ptr,
    chunks,
    most_tiles,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Where each chunk's slots of each expert begin in the order of experts, and the tiles of that order.

    Args:
        counts_ptr: int32 ``[chunks, BINS]``.
        begins_ptr: int32 ``[chunks, BINS]``, written.
        ends_ptr: where each expert ends, int32 ``[BINS]``, written.
        tiles_ptr: int32 ``[3, most_tiles]``, written: expert (-1: there is no such tile), first row, end of its rows.
        TOKENS: rows a tile.
    """
    bins = tl.arange(0, BINS)
    totals = tl.zeros((BINS,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        spot = chunk[:, None] * BINS + bins[None, :]
        totals += tl.sum(tl.load(counts_ptr + spot, mask=(chunk < chunks)[:, None], other=0), axis=0)
    ends = tl.cumsum(totals, axis=0)
    tl.store(ends_ptr + bins, ends)
    running = ends - totals
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        spot = chunk[:, None] * BINS + bins[None, :]
        inside = (chunk < chunks)[:, None]
        counts = tl.load(counts_ptr + spot, mask=inside, other=0)
        tl.store(begins_ptr + spot, tl.cumsum(counts, axis=0) - counts + running[None, :], mask=inside)
        running += tl.sum(counts, axis=0)
    tiles = (totals + TOKENS - 1) // TOKENS
    tile_ends = tl.cumsum(tiles, axis=0)
    # Row of tile t of an expert: t * TOKENS beyond this.
    shift = ends - totals - (tile_ends - tiles) * TOKENS
    for first in range(0, most_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        expert = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        own = expert[:, None] == bins[None, :]
        begin = tl.sum(tl.where(own, shift[None, :], 0), axis=1) + tile * TOKENS
        end = tl.sum(tl.where(own, ends[None, :], 0), axis=1)
        inside = tile < most_tiles
        tl.store(tiles_ptr + tile, tl.where(expert < BINS, expert, -1), mask=inside)
        tl.store(tiles_ptr + most_tiles + tile, begin, mask=inside)
        tl.store(tiles_ptr + 2 * most_tiles + tile, end, mask=inside)


@triton.jit
def place_kernel(
    index_ptr, begins_ptr, order_ptr, slots, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr
):
    """order[row] = slot: the slots by expert, then by number; int32 ``[slots]``. Those of no expert are not in it."""
    chunk = tl.program_id(0)
    local = tl.arange(0, CHUNK)
    slot = chunk * CHUNK + local
    expert = routed_expert(index_ptr, slot, slots, EXPERTS, BINS)
    # The same numbers once more, along the other axis.
    other = routed_expert(index_ptr, chunk * CHUNK + tl.arange(0, CHUNK), slots, EXPERTS, BINS)
    before = (other[:, None] == expert[None, :]) & (local[:, None] < local[None, :])
    rank = tl.sum(before.to(tl.int32), axis=0)
    routed = expert < BINS
    row = tl.load(begins_ptr + chunk * BINS + expert, mask=routed, other=0) + rank
    tl.store(order_ptr + row, slot, mask=routed)


@triton.jit
def unpacked(codes, scale, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """code * block scale * 2**-14 of one nibble of each byte, exact; `scale` as `scale_value` gives it."""
    wide = codes.to(tl.uint16)
    if HIGH:
        sign = (wide & 0x80) << 8
        magnitude = (wide & 0x70) << 2
    else:
        sign = (wide & 0x8) << 12
        magnitude = (wide & 0x7) << 6
    if tl.float16 == DTYPE:
        magnitude = magnitude << 3
    bits = sign | magnitude
    if INTERPRETED and tl.bfloat16 == DTYPE:
        return ((bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True) * scale.to(tl.float32)).to(DTYPE)
    return bits.to(DTYPE, bitcast=True) * scale


@triton.jit
def scale_value(bits, DTYPE: tl.constexpr):
    """E4M3 bits, not negative and not NaN, as what `unpacked` multiplies by.

    Codes stand for their value times 2**-126 in bfloat16 and 2**-14 in float16.
    """
    wide = (bits & 0x7F).to(tl.uint32)
    value = (wide << 20).to(tl.float32, bitcast=True)
    if tl.float16 == DTYPE:
        value = value * 1.329227995784916e36
    else:
        value = value * 8.307674973655724e34 * 8.307674973655724e34
    return value.to(DTYPE)


@triton.jit
def product_kernel(
    x_ptr,
    packed_ptr,
    block_scale_ptr,
    tensor_scale_ptr,
    bias_ptr,
    out_ptr,
    tiles_ptr,
    order_ptr,
    most_tiles,
    tokens,
    K: tl.constexpr,
    N: tl.constexpr,
    PLACES: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    ROUTED: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of x @ W.T for the expert that its rows are routed to.

    Args:
        x_ptr: even columns, then odd ones, ``[tokens or rows, K]``.
        packed_ptr: ``[E, weight rows, K / 2]``; block_scale_ptr, tensor_scale_ptr: with it.
        out_ptr: gated: silu(gate) * up by row of the order, ``[rows, N]``, even columns first. Otherwise ``[slots, N]``
            where routed and ``[tokens, N]`` where not.
        tiles_ptr, order_ptr: see `scan_kernel` and `place_kernel`; not read unless ROUTED.
        tokens: rows of x, if not ROUTED.
        N: columns of the output: weight rows, or half of them if GATED.
        PLACES: experts a token; x is read at slot // PLACES if GATED.
        ROWS: weight rows a tile. GATED: half of them gate, half up, in turns.
        DEPTH: bytes of a weight row a step.
    """
    parts: tl.constexpr = (N + (ROWS // 2 if GATED else ROWS) - 1) // (ROWS // 2 if GATED else ROWS)
    weight_rows: tl.constexpr = 2 * N if GATED else N
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    if ROUTED:
        expert = tl.load(tiles_ptr + tile).to(tl.int64)
        if expert < 0:
            return
        first = tl.load(tiles_ptr + most_tiles + tile)
        end = tl.load(tiles_ptr + 2 * most_tiles + tile)
    else:
        expert = tl.zeros((), tl.int64)
        first = tile * TOKENS
        end = tokens
    row = first + tl.arange(0, TOKENS)
    inside = row < end
    slot = row
    if ROUTED:
        slot = tl.load(order_ptr + row, mask=inside, other=0)
    source = slot // PLACES if GATED else row
    # Rows behind the end compute the first row once more, and nobody stores them: cheaper than masked loads.
    source = tl.where(inside, source, slot if GATED else first).to(tl.int64)

    j = tl.arange(0, ROWS)
    if GATED:
        # Even columns of the tile, then odd ones, so that the halves of the output are stored in runs.
        half: tl.constexpr = ROWS // 4
        column = part * (ROWS // 2) + 2 * ((j // 2) % half) + (j // 2) // half
        weight_row = tl.where(column < N, column + (j % 2) * N, 0)
    else:
        weight_row = tl.where(part * ROWS + j < N, part * ROWS + j, 0)
    byte = tl.arange(0, DEPTH)
    block = tl.arange(0, DEPTH // 8)
    codes_at = packed_ptr + expert * (weight_rows * (K // 2)) + weight_row[:, None] * (K // 2) + byte[None, :]
    scales_at = block_scale_ptr + expert * (weight_rows * (K // 16)) + weight_row[:, None] * (K // 16) + block[None, :]
    x_at = x_ptr + source[None, :] * K + byte[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(0, K // 2, DEPTH):
        if (K // 2) % DEPTH == 0:
            codes = tl.load(codes_at + step)
            bits = tl.load(scales_at + step // 8)
            even = tl.load(x_at + step)
            odd = tl.load(x_at + step + K // 2)
        else:
            deep = step + byte < K // 2
            codes = tl.load(codes_at + step, mask=deep[None, :], other=0)
            bits = tl.load(scales_at + step // 8, mask=(step // 8 + block < K // 16)[None, :], other=0)
            even = tl.load(x_at + step, mask=deep[:, None], other=0.0)
            odd = tl.load(x_at + step + K // 2, mask=deep[:, None], other=0.0)
        scale = scale_value(bits, dtype)[:, :, None]
        scale = tl.reshape(tl.broadcast_to(scale, (ROWS, DEPTH // 8, 8)), (ROWS, DEPTH))
        low, high = unpacked(codes, scale, False, dtype), unpacked(codes, scale, True, dtype)
        if INTERPRETED:
            sums = tl.dot(low.to(tl.float32), even.to(tl.float32), sums)
            sums = tl.dot(high.to(tl.float32), odd.to(tl.float32), sums)
        else:
            sums = tl.dot(low, even, sums)
            sums = tl.dot(high, odd, sums)

    tensor_scale = tl.load(tensor_scale_ptr + expert)
    if RECIPROCAL:
        sums *= tl.div_rn(16384.0, tensor_scale)
    else:
        sums *= 16384.0 * tensor_scale
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (ROWS // 2, 2, TOKENS)), (0, 2, 1)))
        value = gate / (1.0 + tl.exp(-gate)) * up
        i = tl.arange(0, ROWS // 2)
        natural = part * (ROWS // 2) + 2 * (i % half) + i // half
        # Runs of `half` columns; the compiler does not see through the remainder.
        column = tl.max_contiguous((i // half) * (N // 2) + part * half + i % half, half)
        if N % 16 == 0 and half % 8 == 0:
            column = tl.multiple_of(column, 8)
        target = out_ptr + row[:, None].to(tl.int64) * N + column[None, :]
        mask = inside[:, None]
        if N % (ROWS // 2) != 0:
            mask = mask & (natural < N)[None, :]
    else:
        column = part * ROWS + j
        value = sums
        if BIASED:
            value += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
        target = out_ptr + slot[:, None].to(tl.int64) * N + column[None, :]
        mask = inside[:, None]
        if N % ROWS != 0:
            mask = mask & (column < N)[None, :]
    tl.store(target, tl.trans(value).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mix_kernel(
    rows_ptr,
    index_ptr,
    weights_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = sum over the places p of t, in order, of weights[t, p] * rows[t * PLACES + p]; float32 sums.

    Places that are routed to no expert count nothing; nobody wrote their rows.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(PLACES):
        slot = token * PLACES + place
        # The same number for every column; a scalar condition as a mask is too much for the interpreter.
        expert = tl.load(index_ptr + slot + tl.zeros((BLOCK,), tl.int32))
        routed = inside & (expert >= 0) & (expert < EXPERTS)
        row = tl.load(rows_ptr + slot * WIDTH + column, mask=routed, other=0.0).to(tl.float32)
        weight = tl.where(routed, tl.load(weights_ptr + slot).to(tl.float32), 0.0)
        total += weight * row
    tl.store(out_ptr + token * WIDTH + column, total.to(out_ptr.dtype.element_ty), mask=inside)
