"""Slots in the order of their experts, counted and sorted on the GPU: the host never waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from omnifp4.kernels.prefill import kernels

SLOTS_PER_CHUNK: Final = 256
CHUNKS_PER_STEP: Final = 64
TILES_PER_STEP: Final = 64


@dataclass(frozen=True, slots=True)
class Routing:
    """What the grouped products read. A slot is one (token, place): number token * k + place.

    Attributes:
        index: the expert of each slot, ``[tokens, k]``.
        order: slots by expert, then by number, int32 ``[tokens * k]``. Slots of no expert are left out, so that the
            last entries may be unwritten.
        ends: where each expert ends in `order`, int32 ``[experts or more]``.
        tiles: int32 ``[3, most tiles]``: expert (-1: no such tile), first row, end of the expert's rows.
        tile_tokens: rows a tile.
    """

    index: Tensor
    order: Tensor
    ends: Tensor
    tiles: Tensor
    tile_tokens: int

    @property
    def places(self) -> int:
        """Experts a token."""
        return self.index.shape[1]


def route(index: Tensor, experts: int, tile_tokens: int) -> Routing:
    """Sort the slots by expert and cut each expert's rows into tiles of `tile_tokens`.

    Args:
        index: int64 or int32 ``[tokens, k]``; a number outside of ``0 ... experts - 1`` is no expert.
        experts: how many there are.
        tile_tokens: rows a tile.
    """
    index = index.contiguous()
    slots, device = index.numel(), index.device
    chunks, bins = triton.cdiv(slots, SLOTS_PER_CHUNK), max(16, triton.next_power_of_2(experts))
    most_tiles = slots // tile_tokens + min(experts, slots)
    counts = torch.empty((2, chunks, bins), dtype=torch.int32, device=device)
    ends = torch.empty(bins, dtype=torch.int32, device=device)
    tiles = torch.empty((3, most_tiles), dtype=torch.int32, device=device)
    order = torch.empty(slots, dtype=torch.int32, device=device)
    sizes = {"EXPERTS": experts, "BINS": bins, "CHUNK": SLOTS_PER_CHUNK}
    kernels.count_kernel[(chunks,)](index, counts[0], slots, **sizes, num_warps=8)
    kernels.scan_kernel[(1,)](
        counts[0],
        counts[1],
        ends,
        tiles,
        chunks,
        most_tiles,
        TOKENS=tile_tokens,
        BINS=bins,
        CHUNKS=CHUNKS_PER_STEP,
        TILES=TILES_PER_STEP,
        num_warps=16,
    )
    kernels.place_kernel[(chunks,)](index, counts[1], order, slots, **sizes, num_warps=8)
    return Routing(index, order, ends, tiles, tile_tokens)
