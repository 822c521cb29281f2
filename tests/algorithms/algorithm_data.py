"""Weights with heavy tails and inputs that hang together, as those of trained layers."""

from __future__ import annotations

import torch
from torch import Tensor


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Student t with five degrees of freedom, float32 ``[rows, columns]``, of the size of trained weights."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    chi = torch.randn(5, rows, columns, generator=generator).square().mean(dim=0)
    return 0.02 * normal / chi.sqrt()


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs ``[tokens, columns]`` with a falling spectrum, and channels of unlike size. Same seed, same directions."""
    shape = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=shape) * torch.arange(1, columns + 1)[:, None] ** -0.5
    gain = torch.exp(0.7 * torch.randn(columns, generator=shape))
    gain[:: max(1, columns // 3)] *= 6
    values = torch.Generator().manual_seed(seed + tokens)
    hidden = torch.randn(tokens, columns, generator=values) @ mix
    return (hidden + 0.5 * torch.randn(tokens, columns, generator=values)) * gain


def hessian_of(inputs: Tensor) -> Tensor:
    """``E[x x']`` of ``[tokens, columns]``."""
    return inputs.mT @ inputs / inputs.shape[-2]
