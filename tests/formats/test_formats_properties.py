"""What holds for any weight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from omnifp4.formats import fast_cpu, reference
from omnifp4.formats.nvfp4 import E4M3_MAX_BITS, NVFP4Tensor, ScaleRule, pack, unpack

RULES = st.sampled_from(ScaleRule)
MODEST = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def weights(draw: st.DrawFn, largest: float = 2.0**120) -> np.ndarray:
    """Float32 ``[rows, 32]``: any finite numbers, or Gaussian ones of any size; hypothesis finds the corners."""
    rows = draw(st.integers(1, 4))
    if draw(st.booleans()):
        elements = st.floats(-largest, largest, width=32, allow_nan=False)
        return draw(hnp.arrays(np.float32, (rows, 32), elements=elements))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return (rng.normal(size=(rows, 32)) * 2.0 ** draw(st.integers(-60, 60))).astype(np.float32)


@MODEST
@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 9).map(lambda n: 2 * n)), elements=st.integers(0, 15)
    )
)
def test_unpack_inverts_pack(codes: np.ndarray) -> None:
    np.testing.assert_array_equal(unpack(pack(codes)), codes)


@MODEST
@given(weights(), RULES)
def test_scales_are_never_zero_or_nan_and_decoded_values_finite(weight: np.ndarray, rule: ScaleRule) -> None:
    for encoded in (reference.encode(weight, rule), fast_cpu.encode(weight, "F32", rule)[0]):
        assert encoded.tensor_scale > 0
        assert ((encoded.block_scale >= 1) & (encoded.block_scale <= E4M3_MAX_BITS)).all()
        assert np.isfinite(reference.decode(encoded)).all()


@MODEST
@given(weights(), RULES)
def test_decoded_values_keep_their_codes_under_the_same_scales(weight: np.ndarray, rule: ScaleRule) -> None:
    encoded, _ = fast_cpu.encode(weight, "F32", rule)
    again = reference.encode_codes(reference.decode(encoded), encoded.block_scale, encoded.tensor_scale)
    np.testing.assert_array_equal(pack(again), encoded.packed)


@MODEST
@given(weights())
def test_sweeping_decoded_values_changes_no_value(weight: np.ndarray) -> None:
    encoded, _ = fast_cpu.encode(weight, "F32", ScaleRule.SWEEP)
    decoded = reference.decode(encoded)
    again, stats = fast_cpu.encode(decoded, "F32", ScaleRule.SWEEP, tensor_scale=encoded.tensor_scale)
    assert stats.squared_error == 0.0
    np.testing.assert_array_equal(reference.decode(again), decoded)


@MODEST
@given(weights(largest=2.0**40), RULES, st.integers(-20, 20))
def test_powers_of_two_commute(weight: np.ndarray, rule: ScaleRule, exponent: int) -> None:
    weight = np.where(np.abs(weight) < 2.0**-60, np.float32(0), weight)
    factor = np.float32(2.0**exponent)
    encoded, _ = fast_cpu.encode(weight, "F32", rule)
    scaled, _ = fast_cpu.encode(weight * factor, "F32", rule)
    if weight.any():
        assert scaled.tensor_scale == encoded.tensor_scale * factor
    np.testing.assert_array_equal(scaled.packed, encoded.packed)
    np.testing.assert_array_equal(scaled.block_scale, encoded.block_scale)


@MODEST
@given(weights(largest=2.0**60))
def test_more_candidates_never_err_more(weight: np.ndarray) -> None:
    """Under one tensor scale, in every block: sweep at most four-over-six at most max."""
    scale = reference.tensor_scale_for(float(np.abs(weight).max()), ScaleRule.SWEEP)
    errors = []
    for rule in (ScaleRule.SWEEP, ScaleRule.FOUR_OVER_SIX, ScaleRule.MAX):
        encoded, _ = fast_cpu.encode(weight, "F32", rule, tensor_scale=scale)
        errors.append(reference._squared_error(reference.blocks_of(weight), encoded.block_scale, scale, None))
    slack = 1 + 1e-5
    assert (errors[0] <= errors[1] * slack).all()
    assert (errors[1] <= errors[2] * slack).all()


@MODEST
@given(weights())
def test_decoded_sweep_values_are_exact_in_bf16(weight: np.ndarray) -> None:
    encoded, _ = fast_cpu.encode(weight, "F32", ScaleRule.SWEEP)
    assert not (reference.decode(encoded).view(np.uint32) & 0xFFFF).any()


@MODEST
@given(weights(), RULES)
def test_twins_write_the_same_codes_under_the_same_scales(weight: np.ndarray, rule: ScaleRule) -> None:
    encoded, _ = fast_cpu.encode(weight, "F32", rule)
    codes = reference.encode_codes(weight, encoded.block_scale, encoded.tensor_scale)
    np.testing.assert_array_equal(encoded.packed, pack(codes))
    np.testing.assert_array_equal(fast_cpu.decode(encoded), reference.decode(encoded))


def test_one_row_and_empty_weights() -> None:
    for shape in ((1, 16), (0, 16), (3, 0)):
        encoded, stats = fast_cpu.encode(np.ones(shape, np.float32), "F32")
        assert isinstance(encoded, NVFP4Tensor) and encoded.shape == shape
        assert stats.squared_error == pytest.approx(0.0)
