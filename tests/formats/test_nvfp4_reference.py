"""The reference against values worked out by hand, and against torch's own E4M3."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnifp4.formats import reference
from omnifp4.formats.nvfp4 import (
    AMAX_LIMIT,
    E4M3_VALUES,
    TENSOR_SCALE_MIN,
    NVFP4Tensor,
    ScaleRule,
    pack,
    unpack,
)


def test_e4m3_table_is_torchs() -> None:
    torchs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3_VALUES, torchs)
    assert np.signbit(E4M3_VALUES[0x80])


def test_round_to_e4m3_is_torchs_within_the_allowed_range() -> None:
    rng = np.random.default_rng(0)
    table = E4M3_VALUES[1:0x7F]
    middles = (table[1:] + table[:-1]) / 2
    values = np.concatenate([np.exp2(rng.uniform(-9, 8.7, 20_000)), table, middles]).astype(np.float32)
    values = values[values <= 448]
    torchs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(reference.round_to_e4m3(values), np.maximum(torchs, 1))


def test_round_to_e4m3_stays_in_range() -> None:
    values = np.array([0.0, 1e-30, 2.0**-11, 448.0, 463.9, 465.0, 1e30, np.inf], dtype=np.float32)
    np.testing.assert_array_equal(reference.round_to_e4m3(values), [1, 1, 1, 126, 126, 126, 126, 126])


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, 0), (0.25, 0), (0.2500001, 1), (0.5, 1), (0.75, 2), (0.7499999, 1), (1.0, 2), (1.25, 2), (1.5, 3),
        (1.75, 4), (2.0, 4), (2.5, 4), (2.5000002, 5), (3.0, 5), (3.5, 6), (4.0, 6), (5.0, 6), (5.0000005, 7),
        (6.0, 7), (7.5, 7), (np.inf, 7), (-0.0, 8), (-0.1, 8), (-0.5, 9), (-5.0, 14), (-100.0, 15),
    ],
)  # fmt: skip
def test_round_to_e2m1_ties_to_the_even_code(value: float, code: int) -> None:
    assert reference.round_to_e2m1(np.array([value], dtype=np.float32)).tolist() == [code]


def test_even_column_is_in_the_low_nibble() -> None:
    codes = np.array([[1, 2, 15, 0]], dtype=np.uint8)
    assert pack(codes).tolist() == [[0x21, 0x0F]]
    np.testing.assert_array_equal(unpack(pack(codes)), codes)


def test_tensor_scale_of_each_rule() -> None:
    assert reference.tensor_scale_for(2688.0, ScaleRule.MAX) == 1.0
    assert reference.tensor_scale_for(1536.0, ScaleRule.FOUR_OVER_SIX) == 1.0
    assert reference.tensor_scale_for(1536.0, ScaleRule.SWEEP) == 1.0
    assert reference.tensor_scale_for(1537.0, ScaleRule.SWEEP) == 2.0
    assert reference.tensor_scale_for(0.0, ScaleRule.SWEEP) == 1.0
    assert reference.tensor_scale_for(1e-44, ScaleRule.MAX) == TENSOR_SCALE_MIN
    assert np.isfinite(reference.tensor_scale_for(AMAX_LIMIT, ScaleRule.SWEEP))
    for amax in (np.nan, np.inf, AMAX_LIMIT * 1.01):
        with pytest.raises(ValueError, match="cannot be encoded"):
            reference.tensor_scale_for(amax, ScaleRule.SWEEP)


def test_max_scaling_by_hand() -> None:
    """Largest value 2688, so the tensor scale is 1; the second block's scale is 12 / 6 = 2."""
    weight = np.zeros((1, 32), dtype=np.float32)
    weight[0, 0] = -2688.0
    weight[0, 16:20] = [12.0, 1.0, -5.0, 2.9]
    encoded = reference.encode(weight, ScaleRule.MAX)
    assert E4M3_VALUES[encoded.block_scale].tolist() == [[448.0, 2.0]]
    assert unpack(encoded.packed)[0, 16:20].tolist() == [7, 1, 12, 3]
    assert reference.decode(encoded)[0, [0, 16, 17, 18, 19]].tolist() == [-2688.0, 12.0, 1.0, -4.0, 3.0]


def test_four_over_six_maps_to_four_when_that_errs_less() -> None:
    """Values 4 and 3 in a block fit exactly when 4 stays 4; scaled to 6 the other would be 4.5."""
    weight = np.zeros((1, 32), dtype=np.float32)
    weight[0, 0] = 1536.0
    weight[0, 16:18] = [4.0, 3.0]
    encoded = reference.encode(weight, ScaleRule.FOUR_OVER_SIX)
    assert E4M3_VALUES[encoded.block_scale[0, 1]] == 1.0
    assert reference.decode(encoded)[0, 16:18].tolist() == [4.0, 3.0]


def test_sweep_finds_an_exact_scale_that_max_misses() -> None:
    """Max scaling gives 5 / 6, E4M3 0.8125, and misses both values; 1.25 holds 5 and 2.5 exactly."""
    weight = np.zeros((1, 32), dtype=np.float32)
    weight[0, 0] = 1536.0
    weight[0, 16:18] = [5.0, 2.5]
    encoded = reference.encode(weight, ScaleRule.SWEEP)
    assert reference.decode(encoded)[0, 16:18].tolist() == [5.0, 2.5]


def test_blocks_without_importance_are_not_clipped() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    importance = np.ones(32, dtype=np.float32)
    importance[:16] = 0.0
    weighed = reference.encode(weight, importance=importance)
    np.testing.assert_array_equal(weighed.block_scale, reference.encode(weight).block_scale)


def test_importance_moves_error_away_from_what_matters() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    importance = np.random.default_rng(1).exponential(size=64).astype(np.float32) ** 2

    def weighed(encoded: NVFP4Tensor) -> float:
        return float((importance * (weight - reference.decode(encoded)) ** 2).sum())

    assert weighed(reference.encode(weight, importance=importance)) < 0.97 * weighed(reference.encode(weight))


@pytest.mark.parametrize("bad", [np.zeros((2, 17)), np.zeros(16), np.full((1, 16), np.nan), np.full((1, 16), np.inf)])
def test_refuses_what_it_cannot_hold(bad: np.ndarray) -> None:
    with pytest.raises(ValueError):
        reference.encode(bad.astype(np.float32))
