"""Block scales chosen by what their errors do to the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from omnifp4.algorithms.errors import damped
from omnifp4.algorithms.grid import blocks_of, e2m1_values, e4m3_values, max_block_scales, round_to_e2m1, round_to_e4m3
from omnifp4.formats.nvfp4 import E2M1_MAX, E4M3_MAX_BITS, E4M3_MIN_BITS, SWEEP_OFFSETS, ScaleRule

HESSIAN_OFFSETS: Final = tuple(range(-4, 15))
"""Candidates of the sweep under a Hessian, as distances in E4M3 codes from max scaling. Errors that cancel within a block
make larger scales worth while: of 6,600 blocks of made-up layers the best of all scales lay from -3 to 13."""

CLIP_RATIOS: Final = tuple(1 - step / 20 for step in range(11))
"""Shares of a block's largest value that AWQ's clip search tries as the largest code: 1, 0.95 … 0.5."""


def choose_block_scales(
    weight: Tensor,
    tensor_scale: Tensor,
    rule: ScaleRule,
    *,
    importance: Tensor | None = None,
    block_hessian: Tensor | None = None,
) -> Tensor:
    """The E4M3 block scales that `rule` picks.

    Args:
        weight: float32 ``[..., out, in]``, finite.
        tensor_scale: float32 ``[...]``.
        rule: see `ScaleRule`; max scaling looks at no error.
        importance: ``E[x**2]``, ``[..., in]``; weighs squared errors. A block without any counts as evenly important.
        block_hessian: 16 x 16 blocks of the Hessian ``[..., in / 16, 16, 16]``; the error of a block is then ``d' H d``.

    Returns:
        uint8 ``[..., out, in / 16]``, never the bits of zero or NaN.

    Raises:
        ValueError: importance and Hessian are both given.
    """
    if importance is not None and block_hessian is not None:
        raise ValueError("give importance or block_hessian, not both")
    if rule is ScaleRule.MAX:
        return max_block_scales(weight, tensor_scale)
    if weight.device.type == "cpu" and block_hessian is None:
        return _compiled(weight, tensor_scale, rule, importance)
    offsets = SWEEP_OFFSETS if block_hessian is None else HESSIAN_OFFSETS
    return _best(weight, tensor_scale, _candidates(weight, tensor_scale, rule, offsets), importance, block_hessian)


def choose_clipped_scales(
    weight: Tensor, tensor_scale: Tensor, block_hessian: Tensor, rule: ScaleRule = ScaleRule.MAX
) -> Tensor:
    """AWQ's clip search: for each block the share of its largest value that becomes 6, by the block's output error.

    Args and returns as in `choose_block_scales`. The scales that `rule` would try are tried as well; under max scaling
    that is the share of 1, which is AWQ's own search.
    """
    amax = blocks_of(weight).abs().amax(dim=-1)
    unit = (torch.tensor(E2M1_MAX) * tensor_scale)[..., None, None]
    candidates = [round_to_e4m3(amax * ratio / unit) for ratio in CLIP_RATIOS]
    if rule is not ScaleRule.MAX:
        candidates = [*_candidates(weight, tensor_scale, rule, HESSIAN_OFFSETS), *candidates]
    return _best(weight, tensor_scale, candidates, None, block_hessian)


def _candidates(weight: Tensor, tensor_scale: Tensor, rule: ScaleRule, offsets: Sequence[int]) -> list[Tensor]:
    by_max = max_block_scales(weight, tensor_scale)
    if rule is ScaleRule.FOUR_OVER_SIX:
        amax = blocks_of(weight).abs().amax(dim=-1)
        return [by_max, round_to_e4m3(amax / (4.0 * tensor_scale)[..., None, None])]
    return [(by_max.int() + o).clamp_(E4M3_MIN_BITS, E4M3_MAX_BITS).to(torch.uint8) for o in offsets]


def _compiled(weight: Tensor, tensor_scale: Tensor, rule: ScaleRule, importance: Tensor | None) -> Tensor:
    """The compiled loops of `omnifp4.formats.fast_cpu`, ten times faster here."""
    import numpy as np

    from omnifp4.formats import fast_cpu

    rows, columns = weight.shape[-2:]
    matrices = weight.reshape(-1, rows, columns).contiguous().numpy()
    scales = tensor_scale.broadcast_to(weight.shape[:-2]).reshape(-1).tolist()
    factors = None
    if importance is not None:
        factors = importance.float().broadcast_to(*weight.shape[:-2], columns).reshape(-1, columns).numpy()
    chosen = np.empty((len(matrices), rows, columns // 16), dtype=np.uint8)
    packed = np.empty((rows, columns // 2), dtype=np.uint8)
    for number, matrix in enumerate(matrices):
        factor = None if factors is None else factors[number]
        fast_cpu.encode_into(matrix, "F32", rule, np.float32(scales[number]), packed, chosen[number], factor)
    return torch.from_numpy(chosen).reshape(*weight.shape[:-1], columns // 16)


def _best(
    weight: Tensor,
    tensor_scale: Tensor,
    candidates: Sequence[Tensor],
    importance: Tensor | None,
    block_hessian: Tensor | None,
) -> Tensor:
    """The candidate of least error for each block, the first of equals."""
    blocks = blocks_of(weight)
    unit = tensor_scale[..., None, None, None]
    hessian = None if block_hessian is None else damped(block_hessian)
    factor = None if importance is None else _evened(blocks_of(importance))[..., None, :, :]
    best, best_error = candidates[0], torch.full(candidates[0].shape, torch.inf, device=weight.device)
    for scale in candidates:
        values = e4m3_values(scale)[..., None]
        # In units of the tensor scale, so that nothing underflows.
        difference = blocks / unit - e2m1_values(round_to_e2m1(blocks / (values * unit))) * values
        if hessian is not None:
            by_block = difference.transpose(-3, -2)
            error = ((by_block @ hessian) * by_block).sum(dim=-1).transpose(-2, -1)
        else:
            squares = difference.square()
            error = (squares if factor is None else squares * factor).sum(dim=-1)
        wins = error < best_error
        best, best_error = torch.where(wins, scale, best), torch.where(wins, error, best_error)
    return best


def _evened(importance: Tensor) -> Tensor:
    """One where a whole block has no importance: there every scale would seem perfect."""
    return torch.where((importance == 0).all(dim=-1, keepdim=True), torch.ones_like(importance), importance)
