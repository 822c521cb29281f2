"""SignRound: offsets of the rounding are learned by the sign of their gradient.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (arXiv 2309.05516). Each value gets an offset in
[-0.5, 0.5], in units of the distance between the two codes around it; the loss is the error of the linear's outputs.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from omnifp4.algorithms.grid import Codes, column_scale
from omnifp4.formats.nvfp4 import E2M1_MAGNITUDES

STEPS: Final = 200
LARGEST_OFFSET: Final = 0.5


def signround(
    weight: Tensor, hessian: Tensor, block_scale: Tensor, tensor_scale: Tensor, *, steps: int = STEPS
) -> Codes:
    """Round a weight up or down so that its outputs change little.

    Args:
        weight: float32 ``[..., out, in]``.
        hessian: ``E[x x']``, float32 ``[..., in, in]``.
        block_scale: E4M3 bits, uint8 ``[..., out, in / 16]``.
        tensor_scale: float32 ``[...]``.
        steps: of the descent; each is ``1 / steps``, falling to zero.

    Returns:
        For each output the best codes of all steps, never worse on `hessian` than rounding to the nearest.
    """
    scale = column_scale(block_scale, tensor_scale)
    wanted = weight / scale
    magnitudes = torch.from_numpy(E2M1_MAGNITUDES).to(weight.device)
    size = wanted.abs()
    below = (torch.bucketize(size, magnitudes, right=True) - 1).clamp_(0, 7)
    above = (below + 1).clamp_(max=7)
    distance = magnitudes[above] - magnitudes[below]
    # Where between its two codes a value lies; beyond the last code there is but one.
    place = torch.where(distance > 0, (size - magnitudes[below]) / distance.clamp(min=0.5), torch.zeros_like(size))
    even = above % 2 == 0
    sign = torch.where(wanted < 0, -1.0, 1.0)
    low, high = (magnitudes[code] * sign * scale - weight for code in (below, above))
    slope = (distance * sign).sign()
    offset = torch.zeros_like(weight)
    best: Tensor | None = None
    best_error = torch.full(weight.shape[:-1], torch.inf, device=weight.device)
    for number in range(steps + 1):
        moved = place + offset
        up = (moved > LARGEST_OFFSET) | ((moved == LARGEST_OFFSET) & even)
        difference = torch.where(up, high, low)
        pushed = difference @ hessian
        error = (pushed * difference).sum(dim=-1)
        wins = error < best_error
        best_error = torch.where(wins, error, best_error)
        best = up if best is None else torch.where(wins[..., None], up, best)
        if number < steps:
            # The derivative of a rounded value by its offset is taken as that of the value before rounding.
            rate = (1 - number / steps) / steps
            offset = (offset - rate * pushed.sign() * slope).clamp_(-LARGEST_OFFSET, LARGEST_OFFSET)
    assert best is not None
    codes = torch.where(best, above, below) + 8 * torch.signbit(wanted)
    return Codes(codes.to(torch.uint8), block_scale, tensor_scale)
