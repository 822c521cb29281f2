"""Products with packed weights in the matrix units: dense, and grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from omnifp4.kernels.prefill import kernels
from omnifp4.kernels.prefill.matrices import PackedMatrices
from omnifp4.kernels.prefill.routing import Routing
from omnifp4.kernels.prefill.unpacking import check_layout


@dataclass(frozen=True, slots=True)
class Tile:
    """The share of one program.

    Attributes:
        rows: weight rows.
        tokens: rows of x.
        depth: columns of the weight a step.
        warps: warps of 32 threads.
        stages: steps whose loads are under way at once.
    """

    rows: int = 128
    tokens: int = 128
    depth: int = 128
    warps: int = 8
    stages: int = 3

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}x{self.depth} w{self.warps} s{self.stages}"


def split_columns(x: Tensor) -> Tensor:
    """The even columns of ``[tokens, in]``, then the odd ones: what the products read."""
    tokens, columns = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    block = min(1024, triton.next_power_of_2(columns // 2))
    kernels.split_columns_kernel[(tokens, triton.cdiv(columns // 2, block))](
        x, out, COLUMNS=columns, BLOCK=block, num_warps=4
    )
    return out


def linear(x: Tensor, weight: PackedMatrices, tile: Tile, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias for one matrix (E is 1), unpacked in the main loop.

    Args:
        x: bfloat16 or float16 ``[tokens, in]``.
        weight: the matrix.
        tile: the share of a program.
        bias: ``[out]``.

    Returns:
        ``[tokens, out]`` in the dtype of `x`; float32 sums.
    """
    tokens, rows = x.shape[0], weight.shape[1]
    out = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if tokens:
        _launch(split_columns(x), weight, out, tile, None, bias, triton.cdiv(tokens, tile.tokens), rows, False)
    return out


def gate_up(x: Tensor, weight: PackedMatrices, routing: Routing, tile: Tile) -> Tensor:
    """silu(gate) * up of every routed slot.

    Args:
        x: `split_columns` of the hidden states, bfloat16 or float16 ``[tokens, H]``.
        weight: gate over up of each expert, ``[E, 2 I, H]``.
        routing: its tiles have `tile.tokens` rows.
        tile: the share of a program; half of its rows are gate, half up.

    Returns:
        ``[tokens * k, I]`` by row of `routing.order`, even columns first; rows of no expert are not written.
    """
    inner = weight.shape[1] // 2
    out = torch.empty((routing.order.numel(), inner), dtype=x.dtype, device=x.device)
    _launch(x, weight, out, tile, routing, None, routing.tiles.shape[1], inner, True)
    return out


def down(x: Tensor, weight: PackedMatrices, routing: Routing, tile: Tile) -> Tensor:
    """The last product of every routed slot.

    Args:
        x: what `gate_up` gave, ``[tokens * k, I]``.
        weight: ``[E, H, I]``.
        routing: the one of `gate_up`, or one with the same index and other tiles.
        tile: the share of a program.

    Returns:
        ``[tokens * k, H]`` by slot; those of no expert are not written.
    """
    out = torch.empty((routing.order.numel(), weight.shape[1]), dtype=x.dtype, device=x.device)
    _launch(x, weight, out, tile, routing, None, routing.tiles.shape[1], weight.shape[1], False)
    return out


def _launch(
    x: Tensor,
    weight: PackedMatrices,
    out: Tensor,
    tile: Tile,
    routing: Routing | None,
    bias: Tensor | None,
    tiles: int,
    width: int,
    gated: bool,
) -> None:
    check_layout(weight.packed, weight.block_scale, weight.tensor_scale)
    columns = weight.shape[2]
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; bfloat16 or float16 is needed")
    if x.shape[1] != columns:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight of {columns} columns")
    if gated and width % 2:
        raise ValueError(f"{width} gated columns are not even")
    if routing is not None and routing.tile_tokens != tile.tokens:
        raise ValueError(f"the routing has tiles of {routing.tile_tokens} tokens, the product of {tile.tokens}")
    parts = triton.cdiv(width, tile.rows // 2 if gated else tile.rows)
    kernels.product_kernel[(tiles * parts,)](
        x,
        weight.packed,
        weight.block_scale,
        weight.tensor_scale,
        x if bias is None else bias,
        out,
        x if routing is None else routing.tiles,
        x if routing is None else routing.order,
        0 if routing is None else routing.tiles.shape[1],
        x.shape[0],
        K=columns,
        N=width,
        PLACES=1 if routing is None else routing.places,
        RECIPROCAL=weight.reciprocal,
        ROUTED=routing is not None,
        GATED=gated,
        BIASED=bias is not None,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        DEPTH=tile.depth // 2,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
