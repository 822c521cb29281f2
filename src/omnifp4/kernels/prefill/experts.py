"""The routed experts of a layer for many tokens, in two ways: on packed weights, and on weights unpacked first."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from omnifp4.kernels.prefill import kernels
from omnifp4.kernels.prefill.matrices import PackedMatrices
from omnifp4.kernels.prefill.products import Tile, down, gate_up, split_columns
from omnifp4.kernels.prefill.routing import route
from omnifp4.kernels.prefill.unpacking import dequantize

MOST_WORKSPACE_BYTES: Final = 768 * 2**20
"""Of rows by slot; more tokens go in chunks."""
COLUMNS_PER_PROGRAM: Final = 1024


def tiles_for(slots: int, experts: int) -> tuple[Tile, Tile]:
    """The tiles of `gate_up` and `down` for so many slots.

    An expert has slots / experts rows on average: a tile much wider computes rows that nobody needs, one much narrower
    unpacks the same weights again.
    """
    average = slots / experts
    if average <= 12:
        return Tile(tokens=16, warps=4, stages=4), Tile(tokens=16, warps=4, stages=4)
    if average <= 28:
        return Tile(tokens=32, warps=4, stages=4), Tile(tokens=32, warps=4, stages=4)
    if average <= 56:
        return Tile(tokens=64, warps=4), Tile(tokens=64, warps=4)
    return Tile(), Tile()


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up_weight: PackedMatrices,
    down_weight: PackedMatrices,
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """Mix the outputs of the routed experts, SiLU gated; weights stay packed. The host waits for nothing.

    Args:
        hidden: bfloat16 or float16 ``[tokens, H]``.
        index: expert of each slot, ``[tokens, k]``; a number outside of ``0 ... E - 1`` is no expert.
        weights: ``[tokens, k]``, any floating type.
        gate_up_weight: ``[E, 2 I, H]``.
        down_weight: ``[E, H, I]``.
        tiles: of `gate_up` and `down`; both with as many tokens. None: `tiles_for`.

    Returns:
        ``[tokens, H]`` in the dtype of `hidden`. The same bits in every run: sums run in a fixed order.
    """
    tokens, width = hidden.shape
    count, inner = down_weight.shape[0], down_weight.shape[2]
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    step = max(1, MOST_WORKSPACE_BYTES // (index.shape[1] * (width + inner) * hidden.element_size()))
    for begin in range(0, tokens, step):
        chunk = slice(begin, min(begin + step, tokens))
        slots = (chunk.stop - begin) * index.shape[1]
        first, second = tiles or tiles_for(slots, count)
        routing = route(index[chunk], count, first.tokens)
        inner_rows = gate_up(split_columns(hidden[chunk]), gate_up_weight, routing, first)
        rows = down(inner_rows, down_weight, routing, second)
        mix(rows, routing.index, weights[chunk], count, out[chunk])
    return out


def experts_unpacked_first(
    hidden: Tensor, index: Tensor, weights: Tensor, gate_up_weight: PackedMatrices, down_weight: PackedMatrices
) -> Tensor:
    """`experts` by another way: unpack all weights to the dtype of `hidden`, then PyTorch's grouped product.

    It writes and reads 16 bits a weight, 1.2 GB a layer of Qwen3-Omni's thinker, and needs room for it: for a
    comparison, and for a great many tokens.
    """
    count, _, width = gate_up_weight.shape
    routing = route(index, count, 128)
    ends, slots = routing.ends[:count], index.numel()
    # Entries behind the last routed slot are unwritten: they get a row of their own, which nobody reads.
    routed = torch.arange(slots, device=index.device) < ends[-1]
    order = torch.where(routed, routing.order, slots)
    x = hidden.index_select(0, torch.where(routed, order // routing.places, 0))
    gate, up = _grouped(x, gate_up_weight, ends).chunk(2, dim=-1)
    by_row = _grouped(F.silu(gate) * up, down_weight, ends)
    rows = by_row.new_empty(slots + 1, width).index_copy_(0, order.long(), by_row)
    out = torch.empty((len(hidden), width), dtype=hidden.dtype, device=hidden.device)
    return mix(rows, routing.index, weights, count, out)


def _grouped(x: Tensor, weight: PackedMatrices, ends: Tensor) -> Tensor:
    wide = dequantize(weight.packed, weight.block_scale, weight.tensor_scale, weight.reciprocal, x.dtype)
    return torch._grouped_mm(x, wide.transpose(1, 2), offs=ends)


def mix(rows: Tensor, index: Tensor, weights: Tensor, count: int, out: Tensor) -> Tensor:
    """out[t] = sum over places p, in order, of weights[t, p] * rows[t * k + p], in float32, rounded once.

    Args:
        rows: ``[tokens * k, H]``; those of no expert are not read.
        index: ``[tokens, k]``; a number outside of ``0 ... count - 1`` is no expert.
        weights: ``[tokens, k]``.
        count: how many experts there are.
        out: ``[tokens, H]``, written and returned.
    """
    tokens, places = index.shape
    width = rows.shape[1]
    block = min(COLUMNS_PER_PROGRAM, triton.next_power_of_2(width))
    kernels.mix_kernel[(tokens, triton.cdiv(width, block))](
        rows, index, weights.contiguous(), out, WIDTH=width, PLACES=places, EXPERTS=count, BLOCK=block, num_warps=4
    )
    return out
