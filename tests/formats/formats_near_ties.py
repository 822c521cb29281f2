"""Telling a near-tie between two scales from a wrong choice."""

from __future__ import annotations

import numpy as np

from omnifp4.formats import reference
from omnifp4.formats.nvfp4 import Float32Array, NVFP4Tensor, ScaleRule

NEAR = 1e-5
"""Two squared errors of a block that differ by less than this part of themselves are a near-tie."""


def count_near_ties(
    weight: Float32Array, encoded: NVFP4Tensor, rule: ScaleRule, importance: Float32Array | None = None
) -> int:
    """How many block scales differ from the reference's; fails on one that is not a near-tie."""
    scale = encoded.tensor_scale
    expected = reference.choose_block_scales(weight, scale, rule, importance)
    factor = None
    if importance is not None:
        factor = reference._block_importance(np.broadcast_to(importance, weight.shape))
    errors = [
        reference._squared_error(reference.blocks_of(weight), s, scale, factor) for s in (encoded.block_scale, expected)
    ]
    differs = encoded.block_scale != expected
    assert (np.abs(errors[0] - errors[1]) <= NEAR * errors[1])[differs].all()
    return int(differs.sum())
