"""AWQ, SVDQuant and SignRound: what each promises."""

from __future__ import annotations

import pytest
import torch
from algorithm_data import correlated, heavy_tailed, hessian_of
from torch import Tensor

from omnifp4.algorithms.awq import Reader, column_sizes, factors_for, search_smoothing
from omnifp4.algorithms.errors import error_of
from omnifp4.algorithms.grid import Codes, decode, encode, tensor_scales
from omnifp4.algorithms.scales import choose_block_scales
from omnifp4.algorithms.signround import signround
from omnifp4.algorithms.svdquant import svdquant
from omnifp4.formats.nvfp4 import ScaleRule

WEIGHT = heavy_tailed(48, 96)
INPUTS = correlated(400, 96)
HESSIAN = hessian_of(INPUTS)


def rounded(weight: Tensor) -> Codes:
    scale = tensor_scales(weight.abs().max(), ScaleRule.SWEEP)
    return encode(weight, choose_block_scales(weight, scale, ScaleRule.SWEEP), scale)


def rounding(weight: Tensor, factors: Tensor, hessian: Tensor) -> Tensor:
    return decode(rounded(weight))


SIZES = column_sizes(WEIGHT)
PLAIN = error_of(decode(rounded(WEIGHT)) - WEIGHT, HESSIAN)


def test_smoothing_lowers_the_output_error() -> None:
    found = search_smoothing([Reader(WEIGHT, HESSIAN)], INPUTS.abs().mean(dim=0), SIZES, rounding)
    assert found.alpha is not None
    assert found.plain_error == pytest.approx(float(PLAIN), rel=1e-5)
    assert found.error < 0.95 * found.plain_error
    values = decode(rounded(WEIGHT * found.factors)) / found.factors
    assert found.error == pytest.approx(float(error_of(values - WEIGHT, HESSIAN)), rel=1e-4)


def test_readers_of_one_norm_share_their_factors_by_the_tokens_they_saw() -> None:
    abs_mean = INPUTS.abs().mean(dim=0)
    even = torch.eye(96)
    alone = search_smoothing([Reader(WEIGHT, HESSIAN)], abs_mean, SIZES, rounding)
    both = search_smoothing([Reader(WEIGHT, HESSIAN, 1e-9), Reader(WEIGHT, even, 1.0)], abs_mean, SIZES, rounding)
    assert alone.alpha != both.alpha


def test_factors_are_powers_of_two_so_the_router_computes_what_it_did() -> None:
    for alpha in (0.3, 1.0):
        factors = factors_for(INPUTS.abs().mean(dim=0), column_sizes(WEIGHT), alpha)
        assert torch.equal(factors.log2(), factors.log2().round())
        assert len(factors.unique()) > 1
        norm, router = torch.randn(96).bfloat16(), torch.randn(8, 96).bfloat16()
        x = torch.randn(5, 96).bfloat16()
        before = torch.nn.functional.linear(x * norm, router)
        after = torch.nn.functional.linear(x * (norm / factors).bfloat16(), (router * factors).bfloat16())
        assert torch.equal(before, after)


def test_channels_without_inputs_stay_in_range() -> None:
    abs_mean = torch.tensor([0.0, 1.0, 1e-30, 1e30])
    assert factors_for(abs_mean, torch.ones(4), 1.0).tolist() == [1.0, 1.0, 2.0**-6, 2.0**6]
    assert factors_for(torch.zeros(4), torch.zeros(4), 0.5).tolist() == [1.0] * 4


def test_small_columns_are_scaled_up_where_inputs_are_alike() -> None:
    weight = WEIGHT.clone()
    weight[:, 3::16] /= 64
    sizes = column_sizes(weight)
    assert torch.equal(sizes, column_sizes(weight * 8))
    factors = factors_for(torch.ones(96), sizes, 0.0)
    assert float(factors[3::16].min()) > float(factors[4::16].max())
    found = search_smoothing([Reader(weight, torch.eye(96))], torch.ones(96), sizes, rounding)
    assert found.alpha is not None
    assert found.error < found.plain_error


def test_svdquant_is_better_with_every_rank() -> None:
    errors = [svdquant(WEIGHT, HESSIAN, rounded, rank=rank).error for rank in (1, 8, 32)]
    assert float(PLAIN) > errors[0] > errors[1] > errors[2]


def test_svdquant_tells_the_error_of_what_it_stores() -> None:
    found = svdquant(WEIGHT, HESSIAN, rounded)
    assert found.branch.up.dtype == found.branch.down.dtype == torch.bfloat16
    assert found.branch.up.shape == (48, 32)
    assert found.branch.down.shape == (32, 96)
    values = decode(found.rounded) + found.branch.product()
    assert found.error == pytest.approx(float(error_of(values - WEIGHT, HESSIAN)), rel=1e-5)


def test_svdquant_with_a_singular_hessian() -> None:
    found = svdquant(WEIGHT, hessian_of(INPUTS[:3]), rounded)
    assert bool(found.branch.product().isfinite().all())
    assert bool(decode(found.rounded).isfinite().all())


def test_signround_moves_codes_by_one_at_most_and_errs_less() -> None:
    nearest = rounded(WEIGHT)
    learned = signround(WEIGHT, HESSIAN, nearest.block_scale, nearest.tensor_scale, steps=100)
    assert error_of(decode(learned) - WEIGHT, HESSIAN) < 0.8 * PLAIN
    magnitude = (learned.codes & 7).int() - (nearest.codes & 7).int()
    assert int(magnitude.abs().max()) == 1


def test_signround_never_does_harm() -> None:
    weights = torch.stack([WEIGHT, WEIGHT])
    hessians = torch.stack([torch.diag(HESSIAN.diagonal()), torch.zeros(96, 96)])
    nearest = rounded(WEIGHT)
    learned = signround(weights, hessians, nearest.block_scale.expand(2, -1, -1), nearest.tensor_scale, steps=10)
    # Without correlations the nearest is the best.
    assert torch.equal(learned.codes[0], nearest.codes)
    assert torch.equal(learned.codes[1], nearest.codes)
