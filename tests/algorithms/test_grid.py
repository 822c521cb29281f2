"""The grid in torch is that of the reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_data import heavy_tailed

from omnifp4.algorithms import grid
from omnifp4.formats import reference
from omnifp4.formats.nvfp4 import E2M1_MAGNITUDES, E4M3_VALUES, NVFP4Tensor, ScaleRule, pack


def around(points: np.ndarray) -> np.ndarray:
    """Each point and its two neighbours in float32, with both signs."""
    points = points.astype(np.float32)
    near = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])
    return np.concatenate([near, -near])


def test_codes_at_every_tie_and_beyond() -> None:
    middles = (E2M1_MAGNITUDES[:-1] + E2M1_MAGNITUDES[1:]) / 2
    values = around(np.concatenate([E2M1_MAGNITUDES, middles, [7.0, 1e9, 1e-30]]))
    np.testing.assert_array_equal(grid.round_to_e2m1(torch.from_numpy(values)).numpy(), reference.round_to_e2m1(values))


def test_e4m3_at_every_tie_and_beyond() -> None:
    known = E4M3_VALUES[:127]
    values = around(np.concatenate([known, (known[:-1] + known[1:]) / 2, [460.0, 464.0, 1e6, 1e-9]]))
    values = values[values >= 0]
    np.testing.assert_array_equal(grid.round_to_e4m3(torch.from_numpy(values)).numpy(), reference.round_to_e4m3(values))


@pytest.mark.parametrize("rule", list(ScaleRule))
def test_encoding_and_decoding_equal_the_reference(rule: ScaleRule) -> None:
    weight = heavy_tailed(24, 64)
    expected = reference.encode(weight.numpy(), ScaleRule.MAX, tensor_scale=None)
    tensor_scale = grid.tensor_scales(weight.abs().max(), rule)
    assert np.float32(tensor_scale) == reference.tensor_scale_for(float(weight.abs().max()), rule)
    block_scale = grid.max_block_scales(weight, grid.tensor_scales(weight.abs().max(), ScaleRule.MAX))
    np.testing.assert_array_equal(block_scale.numpy(), expected.block_scale)
    rounded = grid.encode(weight, block_scale, tensor_scale)
    codes = reference.encode_codes(weight.numpy(), expected.block_scale, np.float32(tensor_scale))
    np.testing.assert_array_equal(rounded.codes.numpy(), codes)
    decoded = reference.decode(NVFP4Tensor(pack(codes), expected.block_scale, np.float32(tensor_scale)))
    np.testing.assert_array_equal(grid.decode(rounded).numpy(), decoded)


def test_experts_are_encoded_as_each_alone() -> None:
    weights = torch.stack([heavy_tailed(8, 32, seed) * 4**seed for seed in range(3)])
    tensor_scale = grid.tensor_scales(weights.abs().amax(dim=(-2, -1)), ScaleRule.MAX)
    together = grid.encode(weights, grid.max_block_scales(weights, tensor_scale), tensor_scale)
    for number, weight in enumerate(weights):
        alone = grid.encode(weight, grid.max_block_scales(weight, tensor_scale[number]), tensor_scale[number])
        assert torch.equal(together.codes[number], alone.codes)
        assert torch.equal(grid.decode(together)[number], grid.decode(alone))
