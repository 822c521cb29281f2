"""SVDQuant: a low-rank branch in BF16 beside the FP4 weight takes what FP4 holds badly.

Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models" (arXiv 2411.05007). The
branch is fitted to what rounding leaves over, in the norm of the outputs: ``W ~ Q + U D`` with ``U [out, r]`` and
``D [r, in]`` nearest under the Hessian, rounding and fit in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from omnifp4.algorithms.errors import DAMPING, damped, error_of
from omnifp4.algorithms.gptq import MORE_DAMPING
from omnifp4.algorithms.grid import Codes, decode

RANK: Final = 32
ROUNDS: Final = 3
"""Times that rounding and branch are fitted to each other."""

OVERSAMPLING: Final = 16
ITERATIONS: Final = 6


class LowRank(NamedTuple):
    """What is computed beside a rounded weight: ``up @ (down @ x)``.

    Attributes:
        up: BF16 ``[out, r]``.
        down: BF16 ``[r, in]``.
    """

    up: Tensor
    down: Tensor

    def product(self) -> Tensor:
        """The matrix that the branch stands for, float32 ``[out, in]``."""
        return self.up.float() @ self.down.float()


class SvdResult(NamedTuple):
    """What `svdquant` made.

    Attributes:
        rounded: codes and scales of the residual.
        branch: the low-rank part.
        error: output error of both together.
    """

    rounded: Codes
    branch: LowRank
    error: float


def svdquant(
    weight: Tensor, hessian: Tensor, rounding: Callable[[Tensor], Codes], *, rank: int = RANK, rounds: int = ROUNDS
) -> SvdResult:
    """Split a weight into an FP4 part and a low-rank part.

    Args:
        weight: float32 ``[out, in]``.
        hessian: ``E[x x']``, float32 ``[in, in]``.
        rounding: rounds a residual ``[out, in]``.
        rank: of the branch; less where the weight is smaller.
        rounds: see `ROUNDS`; the best of them is kept.

    Returns:
        The split. The first branch is the weight's own largest part, so large channels leave the residual.
    """
    factor = _factor(hessian)
    rank = min(rank, *weight.shape)
    branch = _nearest(weight, factor, rank)
    best: SvdResult | None = None
    for _ in range(max(1, rounds)):
        rounded = rounding(weight - branch.product())
        for part in (branch, _nearest(weight - decode(rounded), factor, rank)):
            error = float(error_of(decode(rounded) + part.product() - weight, hessian))
            if best is None or error < best.error:
                best = SvdResult(rounded, part, error)
            branch = part
    assert best is not None
    return best


def _factor(hessian: Tensor) -> Tensor:
    """The lower `L` with ``L L' = H``, float32 ``[in, in]``, of a Hessian that is damped until it has one."""
    for more in MORE_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian.double(), DAMPING * more))
        if int(failed) == 0:
            found: Tensor = lower.float()
            return found
    return torch.eye(hessian.shape[-1], device=hessian.device)


def _nearest(weight: Tensor, factor: Tensor, rank: int) -> LowRank:
    """The matrix of `rank` nearest to `weight` in the norm of the outputs, in BF16.

    By subspace iteration from a fixed start: a full decomposition takes seconds where this takes hundredths.
    """
    seen = weight @ factor
    generator = torch.Generator().manual_seed(0)
    width = min(rank + OVERSAMPLING, *weight.shape)
    basis: Tensor = torch.randn(seen.shape[1], width, generator=generator).to(weight.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(seen @ basis).Q
        basis = torch.linalg.qr(seen.mT @ basis).Q
    left, sizes, right = torch.linalg.svd(seen @ basis, full_matrices=False)
    root = sizes[:rank].sqrt()
    right = root[:, None] * (right[:rank] @ basis.mT)
    down = torch.linalg.solve_triangular(factor, right, upper=False, left=False)
    return LowRank((left[:, :rank] * root).bfloat16(), down.bfloat16())
