"""GPTQ against the plain form of its own definition, and with Hessians that are not right."""

from __future__ import annotations

import pytest
import torch
from algorithm_data import correlated, heavy_tailed, hessian_of
from torch import Tensor

from omnifp4.algorithms.errors import damped, error_of
from omnifp4.algorithms.gptq import _columns, _compiled_columns, _inverse_of_upper, gptq
from omnifp4.algorithms.grid import Codes, column_scale, decode, e2m1_values, encode, round_to_e2m1, tensor_scales
from omnifp4.algorithms.scales import choose_block_scales
from omnifp4.formats.nvfp4 import ScaleRule

WEIGHT = heavy_tailed(32, 80)
HESSIAN = hessian_of(correlated(300, 80))
SCALE = tensor_scales(WEIGHT.abs().max(), ScaleRule.SWEEP)
BLOCKS = choose_block_scales(WEIGHT, SCALE, ScaleRule.SWEEP)


def plainly(weight: Tensor, hessian: Tensor, block_scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """Round one column, let the best of all changes to the others make up for it, strike the column out, and so on.

    The inverse is computed anew for what is left, in float64: no Cholesky factor, no blocks of columns.
    """
    left, scale = weight.double().clone(), column_scale(block_scale, tensor_scale).double()
    wanted = damped(hessian.double())
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    remaining = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    while remaining:
        column = remaining[0]
        inverse = torch.linalg.inv(wanted[remaining][:, remaining])
        codes[:, column] = round_to_e2m1((left[:, column] / scale[:, column]).float())
        error = left[:, column] - e2m1_values(codes[:, column]).double() * scale[:, column]
        left[:, remaining] -= error[:, None] / inverse[0, 0] * inverse[0][None, :]
        remaining = remaining[1:]
    return codes


@pytest.mark.parametrize("columns", [1, 16, 128])
def test_equals_its_definition(columns: int) -> None:
    found = gptq(WEIGHT, HESSIAN, BLOCKS, SCALE, columns=columns)
    expected = plainly(WEIGHT, HESSIAN, BLOCKS, SCALE)
    # One value that lies on a tie in float32 may change what follows in its row.
    rows = (found.rounded.codes != expected).any(dim=1)
    assert rows.float().mean() < 0.1
    error = error_of(decode(found.rounded) - WEIGHT, HESSIAN)
    definition = error_of(decode(Codes(expected, BLOCKS, SCALE)) - WEIGHT, HESSIAN)
    torch.testing.assert_close(error, definition, rtol=0.02, atol=0)
    assert float(found.damping) == pytest.approx(0.01)


def test_the_compiled_loops_equal_the_torch_form() -> None:
    hessian = damped(HESSIAN).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    scale = column_scale(BLOCKS, SCALE)
    in_torch = _columns(WEIGHT.clone(), scale, factor, 16)
    compiled = _compiled_columns(WEIGHT.clone(), scale, factor, 16)
    assert (in_torch != compiled).any(dim=1).float().mean() < 0.05
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5])
    values = torch.cat([ties, -ties]).view(1, -1).repeat(2, 1)
    alone = _compiled_columns(values, torch.ones(2, 16), torch.eye(16), 16)
    assert torch.equal(alone[0], round_to_e2m1(values[0]))


def test_halves_the_output_error_on_inputs_it_never_saw() -> None:
    unseen = hessian_of(correlated(500, 80))
    nearest = error_of(decode(encode(WEIGHT, BLOCKS, SCALE)) - WEIGHT, unseen)
    found = error_of(decode(gptq(WEIGHT, HESSIAN, BLOCKS, SCALE).rounded) - WEIGHT, unseen)
    assert found < 0.5 * nearest


def test_without_correlations_it_rounds_to_the_nearest() -> None:
    found = gptq(WEIGHT, torch.diag(HESSIAN.diagonal()), BLOCKS, SCALE)
    assert torch.equal(found.rounded.codes, encode(WEIGHT, BLOCKS, SCALE).codes)


def test_a_hessian_without_data_rounds_to_the_nearest() -> None:
    found = gptq(WEIGHT, torch.zeros(80, 80), BLOCKS, SCALE)
    assert torch.equal(found.rounded.codes, encode(WEIGHT, BLOCKS, SCALE).codes)


def test_fewer_tokens_than_inputs_and_dead_inputs() -> None:
    few = correlated(5, 80)
    few[:, 7] = 0
    hessian = hessian_of(few)
    assert torch.linalg.matrix_rank(hessian) <= 5
    found = gptq(WEIGHT, hessian, BLOCKS, SCALE)
    values = decode(found.rounded)
    assert bool(values.isfinite().all())
    assert error_of(values - WEIGHT, hessian) < error_of(decode(encode(WEIGHT, BLOCKS, SCALE)) - WEIGHT, hessian)


def test_a_hessian_that_is_not_positive_is_damped_more_and_says_so() -> None:
    broken = HESSIAN - 0.2 * HESSIAN.diagonal().mean() * torch.eye(80)
    hopeless = HESSIAN - 1000 * HESSIAN.diagonal().mean() * torch.eye(80)
    found = gptq(torch.stack([WEIGHT] * 3), torch.stack([HESSIAN, broken, hopeless]), BLOCKS.expand(3, -1, -1), SCALE)
    assert found.damping.tolist()[0] == pytest.approx(0.01)
    assert found.damping.tolist()[1] > 0.01
    assert found.damping.isinf().tolist() == [False, False, True]
    assert bool(decode(found.rounded).isfinite().all())
    assert torch.equal(found.rounded.codes[2], encode(WEIGHT, BLOCKS, SCALE).codes)


def test_experts_together_equal_each_alone() -> None:
    weights = torch.stack([heavy_tailed(16, 48, seed) for seed in range(3)])
    hessians = torch.stack([hessian_of(correlated(100, 48, seed)) for seed in range(3)])
    scale = tensor_scales(weights.abs().amax(dim=(-2, -1)), ScaleRule.SWEEP)
    blocks = choose_block_scales(weights, scale, ScaleRule.SWEEP)
    together = gptq(weights, hessians, blocks, scale)
    for number in range(3):
        alone = gptq(weights[number], hessians[number], blocks[number], scale[number])
        assert (together.rounded.codes[number] != alone.rounded.codes).float().mean() < 0.02


@pytest.mark.parametrize("width", [1, 255, 600])
def test_the_inverse_of_a_triangular_factor(width: int) -> None:
    upper = torch.linalg.cholesky(damped(hessian_of(correlated(2 * width, width))).double(), upper=True)
    found = _inverse_of_upper(torch.stack([upper, 2 * upper]).float())
    expected = torch.linalg.inv(upper)
    for number, factor in enumerate((1, 2)):
        off = (found[number].double() * factor - expected).norm() / expected.norm()
        assert off < 1e-4
    assert not bool(found.tril(-1).any())
