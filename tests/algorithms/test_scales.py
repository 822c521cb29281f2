"""Weighted block scales: equal to the reference where that has them, and the best of what is tried."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_data import correlated, heavy_tailed, hessian_of

from omnifp4.algorithms.errors import damped, diagonal_blocks, error_of
from omnifp4.algorithms.grid import decode, encode, max_block_scales, tensor_scales
from omnifp4.algorithms.scales import HESSIAN_OFFSETS, _best, choose_block_scales, choose_clipped_scales
from omnifp4.formats import reference
from omnifp4.formats.nvfp4 import SWEEP_OFFSETS, ScaleRule

WEIGHT = heavy_tailed(48, 96)
HESSIAN = hessian_of(correlated(400, 96))
SCALE = tensor_scales(WEIGHT.abs().max(), ScaleRule.SWEEP)


@pytest.mark.parametrize("rule", list(ScaleRule))
@pytest.mark.parametrize("weighted", [False, True])
def test_importance_gives_the_scales_of_the_reference(rule: ScaleRule, weighted: bool) -> None:
    importance = HESSIAN.diagonal().clone()
    importance[16:32] = 0
    tensor_scale = tensor_scales(WEIGHT.abs().max(), rule)
    expected = reference.choose_block_scales(
        WEIGHT.numpy(), np.float32(tensor_scale), rule, importance.numpy() if weighted else None
    )
    found = choose_block_scales(WEIGHT, tensor_scale, rule, importance=importance if weighted else None)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_a_diagonal_hessian_is_importance() -> None:
    importance = HESSIAN.diagonal()
    by_hessian = choose_block_scales(WEIGHT, SCALE, ScaleRule.SWEEP, block_hessian=diagonal_blocks(importance.diag()))
    # The Hessian is damped by a hundredth of its mean, and so is the importance it is compared with.
    even = damped(diagonal_blocks(importance.diag())).diagonal(dim1=-2, dim2=-1).reshape(-1)
    by_importance = choose_block_scales(WEIGHT, SCALE, ScaleRule.SWEEP, importance=even)
    # Under a Hessian larger scales are tried as well, and near ties may fall otherwise.
    assert (by_hessian == by_importance).float().mean() > 0.98
    errors = [
        float((decode(encode(WEIGHT, chosen, SCALE)) - WEIGHT).square().mul(even).sum())
        for chosen in (by_hessian, by_importance)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6)


def test_the_local_hessian_is_the_block_diagonal() -> None:
    blocks = diagonal_blocks(HESSIAN)
    assert blocks.shape == (6, 16, 16)
    assert torch.equal(blocks[2], HESSIAN[32:48, 32:48])


def test_no_other_scale_in_reach_errs_less() -> None:
    blocks = diagonal_blocks(HESSIAN)
    chosen = choose_block_scales(WEIGHT, SCALE, ScaleRule.SWEEP, block_hessian=blocks)
    by_max = max_block_scales(WEIGHT, SCALE)

    def errors(scale: torch.Tensor) -> torch.Tensor:
        difference = (decode(encode(WEIGHT, scale, SCALE)) - WEIGHT).unflatten(-1, (-1, 16)).transpose(0, 1)
        return ((difference @ damped(blocks)) * difference).sum(dim=-1).T

    best = torch.stack([errors((by_max.int() + o).clamp(1, 126).to(torch.uint8)) for o in HESSIAN_OFFSETS]).amin(dim=0)
    torch.testing.assert_close(errors(chosen), best, rtol=1e-4, atol=0)
    everything = torch.stack([errors(torch.full_like(by_max, code)) for code in range(1, 127)]).amin(dim=0)
    assert errors(chosen).sum() < 1.01 * everything.sum()


def test_what_the_inputs_say_lowers_the_output_error() -> None:
    plain = choose_block_scales(WEIGHT, SCALE, ScaleRule.SWEEP)
    weighted = choose_block_scales(WEIGHT, SCALE, ScaleRule.SWEEP, importance=HESSIAN.diagonal())
    local = choose_block_scales(WEIGHT, SCALE, ScaleRule.SWEEP, block_hessian=diagonal_blocks(HESSIAN))
    clipped = choose_clipped_scales(WEIGHT, SCALE, diagonal_blocks(HESSIAN))
    plain_error, weighted_error, local_error, clipped_error = (
        float(error_of(decode(encode(WEIGHT, scale, SCALE)) - WEIGHT, HESSIAN))
        for scale in (plain, weighted, local, clipped)
    )
    assert weighted_error < 0.9 * plain_error
    assert local_error < 0.9 * plain_error
    assert clipped_error < plain_error


def test_experts_are_judged_each_by_its_own_inputs() -> None:
    weights = torch.stack([WEIGHT, WEIGHT])
    importance = torch.stack([HESSIAN.diagonal(), torch.ones(96)])
    scales = SCALE.expand(2)
    together = choose_block_scales(weights, scales, ScaleRule.SWEEP, importance=importance)
    for number in range(2):
        alone = choose_block_scales(WEIGHT, SCALE, ScaleRule.SWEEP, importance=importance[number])
        assert torch.equal(together[number], alone)
    assert not torch.equal(together[0], together[1])
    # The compiled loops and the torch form of the same search.
    candidates = [(max_block_scales(WEIGHT, SCALE).int() + o).clamp(1, 126).to(torch.uint8) for o in SWEEP_OFFSETS]
    in_torch = _best(WEIGHT, SCALE, candidates, importance[0], None)
    assert (in_torch != together[0]).float().mean() < 1e-3


def test_both_kinds_of_knowledge_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        choose_block_scales(
            WEIGHT, SCALE, ScaleRule.SWEEP, importance=HESSIAN.diagonal(), block_hessian=diagonal_blocks(HESSIAN)
        )
