"""Reciprocals that change no decoded weight."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifp4.conversion.scales import decoded_table, translate
from omnifp4.formats.nvfp4 import E2M1_MAGNITUDES, E4M3_VALUES


@given(exponent=st.integers(-60, 20), reciprocal=st.booleans())
def test_powers_of_two_are_exact(exponent: int, reciprocal: bool) -> None:
    result = translate(np.float32(2.0**exponent), reciprocal=reciprocal)
    assert result.value == np.float32(2.0**-exponent)
    assert result.exact
    assert not result.nudged
    assert result.same_values


@settings(max_examples=300, deadline=None)
@given(amax=st.floats(1e-3, 1e3), reciprocal=st.booleans())
def test_the_same_values_are_promised_only_where_they_are(amax: float, reciprocal: bool) -> None:
    stored = np.float32(2688.0 / amax if reciprocal else amax / 2688.0)
    result = translate(stored, reciprocal=reciprocal)
    same = decoded_table(result.value, reciprocal=not reciprocal) == decoded_table(stored, reciprocal=reciprocal)
    assert result.same_values == bool(same.all())
    assert abs(float(result.value) * float(stored) - 1) < 4e-7


def test_nearly_all_scales_have_a_perfect_translation() -> None:
    amax = np.random.default_rng(0).uniform(0.1, 4.0, 400).astype(np.float32)
    results = [translate(np.float32(value / np.float32(2688)), reciprocal=False) for value in amax]
    assert sum(result.same_values for result in results) >= 390


def test_the_table_is_the_arithmetic_of_the_libraries() -> None:
    stored = np.float32(0.00123)
    table = decoded_table(stored, reciprocal=False)
    products = E2M1_MAGNITUDES[1:] * (E4M3_VALUES[1:127, None] * stored)
    bits = products.astype(np.float32).view(np.uint32)
    assert np.array_equal(table, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))
