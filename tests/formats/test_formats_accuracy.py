"""Published and measured accuracy of each rule, on tensors of two million values (tails depend on the size)."""

from __future__ import annotations

import numpy as np
import pytest

from omnifp4.formats import fast_cpu, reference
from omnifp4.formats.nvfp4 import EXPECTED_RELATIVE_ERROR, ScaleRule

SHAPE = (1024, 2048)
DRAWS = {"Gauss": 1, "Laplace": 1, "t(5)": 3, "t(3)": 9, "uniform": 1}
"""How many tensors; their median is compared, since one huge value can dominate a tensor of t(3)."""

RELATIVE_ERROR = {
    ScaleRule.MAX: {"Gauss": 9.05e-3, "Laplace": 8.60e-3, "t(5)": 8.53e-3, "t(3)": 8.16e-3, "uniform": 10.33e-3},
    ScaleRule.FOUR_OVER_SIX: {
        "Gauss": 7.56e-3, "Laplace": 7.60e-3, "t(5)": 7.51e-3, "t(3)": 7.50e-3, "uniform": 7.61e-3,
    },
    ScaleRule.SWEEP: {"Gauss": 6.60e-3, "Laplace": 6.81e-3, "t(5)": 6.74e-3, "t(3)": 6.93e-3, "uniform": 6.15e-3},
}  # fmt: skip


def draw(rng: np.random.Generator, distribution: str) -> np.ndarray:
    match distribution:
        case "Gauss":
            return rng.standard_normal(SHAPE, dtype=np.float32)
        case "Laplace":
            return rng.laplace(size=SHAPE).astype(np.float32)
        case "uniform":
            return rng.uniform(-1, 1, size=SHAPE).astype(np.float32)
    return rng.standard_t(int(distribution[2]), size=SHAPE).astype(np.float32)


@pytest.mark.parametrize("distribution", list(DRAWS))
def test_relative_error_of_each_rule(distribution: str) -> None:
    rng = np.random.default_rng(2024)
    errors: dict[ScaleRule, list[float]] = {rule: [] for rule in ScaleRule}
    for _ in range(DRAWS[distribution]):
        weight = draw(rng, distribution)
        for rule in ScaleRule:
            stats = fast_cpu.encode(weight, "F32", rule)[1]
            errors[rule].append(stats.squared_error / stats.energy)
    measured = {rule: float(np.median(errors[rule])) for rule in ScaleRule}
    expected = {rule: RELATIVE_ERROR[rule][distribution] for rule in ScaleRule}
    assert measured == pytest.approx(expected, rel=5e-3)


def test_the_reference_gives_the_same_on_one_tensor() -> None:
    weight = draw(np.random.default_rng(2024), "Gauss")
    encoded = reference.encode(weight, ScaleRule.FOUR_OVER_SIX)
    error = reference.relative_squared_error(weight, reference.decode(encoded))
    assert error == pytest.approx(EXPECTED_RELATIVE_ERROR[ScaleRule.FOUR_OVER_SIX], rel=5e-3)
    assert error == pytest.approx(RELATIVE_ERROR[ScaleRule.FOUR_OVER_SIX]["Gauss"], rel=5e-3)
