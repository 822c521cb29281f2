"""Output errors from Hessians."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from omnifp4.formats.nvfp4 import BLOCK_SIZE

DAMPING: Final = 0.01
"""Added to the diagonal of a Hessian, in units of its mean: fewer samples than inputs leave it singular."""


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared difference of the outputs, summed over them: float32 ``[...]``.

    Args:
        weight, rounded: float32 ``[..., out, in]``.
        hessian: ``E[x x']``, float32 ``[..., in, in]``.
    """
    return error_of(rounded - weight, hessian)


def error_of(difference: Tensor, hessian: Tensor) -> Tensor:
    """``tr(D H D')`` of ``[..., out, in]`` and ``[..., in, in]``: float32 ``[...]``."""
    return ((difference @ hessian) * difference).sum(dim=(-2, -1))


def error_under(difference: Tensor, hessian: Tensor) -> Tensor:
    """`error_of` under a full Hessian ``[in, in]``, or under blocks of one ``[in / 16, 16, 16]``, of ``[out, in]``."""
    return errors_of_rows(difference, hessian).sum()


def errors_of_rows(difference: Tensor, hessian: Tensor) -> Tensor:
    """The share of each row ``[out]`` in `error_under`."""
    if hessian.ndim == 2:
        return ((difference @ hessian) * difference).sum(dim=-1)
    blocks = difference.reshape(difference.shape[0], -1, BLOCK_SIZE).transpose(0, 1)
    return ((blocks @ hessian) * blocks).sum(dim=(0, 2))


def scaled_blocks(blocks: Tensor, factors: Tensor) -> Tensor:
    """Blocks ``[in / 16, 16, 16]`` of the Hessian of inputs that are divided by `factors` ``[in]``."""
    by_block = factors.reshape(-1, BLOCK_SIZE)
    return blocks / (by_block[:, :, None] * by_block[:, None, :])


def diagonal_blocks(hessian: Tensor) -> Tensor:
    """The 16 x 16 blocks on the diagonal: ``[..., in, in]`` to ``[..., in / 16, 16, 16]``."""
    count = hessian.shape[-1] // BLOCK_SIZE
    blocks = hessian.reshape(*hessian.shape[:-2], count, BLOCK_SIZE, count, BLOCK_SIZE)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The Hessian with `damping` times its mean diagonal added to the diagonal; inputs that are never there get the mean.

    Args:
        hessian: ``[..., in, in]``, not changed.
        damping: share of the mean diagonal.

    Returns:
        A new tensor. Where the whole Hessian is zero it is the identity: without data all inputs count alike.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(dim=-1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    added = torch.where(diagonal > 0, damping * mean, mean)
    result = hessian.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(added)
    return result
