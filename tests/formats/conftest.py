"""Source values of every kind that a checkpoint may hold, in every source dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from omnifp4.formats.nvfp4 import AMAX_LIMIT

ROWS, COLUMNS = 40, 336
"""40 * 336 / 16 blocks: more than one panel of the compiled loops, and a last one that is not full."""


def random_values(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return (rng.normal(size=(ROWS, COLUMNS)) * 0.02).astype(np.float32)


def values_of(name: str) -> npt.NDArray[np.float32]:
    """float32 ``[ROWS, COLUMNS]``, the same at every call."""
    rng = np.random.default_rng(11)
    weight = random_values(rng)
    match name:
        case "heavy-tailed":
            return (rng.standard_t(2, size=(ROWS, COLUMNS)) * 0.02).astype(np.float32)
        case "zeros":
            return np.zeros_like(weight)
        case "negative zeros":
            weight[::2] = -0.0
        case "zero blocks":
            weight[3:20, 16:48] = 0.0
        case "float32 denormals":
            return (rng.normal(size=(ROWS, COLUMNS)) * 1e-40).astype(np.float32)
        case "half denormals":
            return (rng.normal(size=(ROWS, COLUMNS)) * 2e-6).astype(np.float32)
        case "one huge":
            weight[5, 7] = 1e30
        case "largest":
            weight[5, 7] = -AMAX_LIMIT
        case "constant blocks":
            blocks = rng.normal(size=(ROWS, COLUMNS // 16)).astype(np.float32)
            return np.repeat(blocks, 16, axis=1)
        case "powers of two":
            return np.exp2(rng.integers(-20, 4, size=(ROWS, COLUMNS))).astype(np.float32)
        case "wide range":
            exponents = np.linspace(-30, 30, ROWS * COLUMNS // 16).reshape(ROWS, -1)
            return (rng.normal(size=(ROWS, COLUMNS)) * np.repeat(10.0**exponents, 16, axis=1)).astype(np.float32)
        case "quantized before":
            codes = rng.choice([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], size=(ROWS, COLUMNS))
            scales = np.repeat(np.exp2(rng.integers(-6, 0, size=(ROWS, COLUMNS // 16))), 16, axis=1)
            return (codes * scales * rng.choice([-1, 1], size=codes.shape)).astype(np.float32)
        case "midpoints":
            middles = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], size=(ROWS, COLUMNS))
            middles[:, ::16] = 6.0
            return (middles * 0.5).astype(np.float32)
    return weight


CLASSES = (
    "random",
    "heavy-tailed",
    "zeros",
    "negative zeros",
    "zero blocks",
    "float32 denormals",
    "half denormals",
    "one huge",
    "largest",
    "constant blocks",
    "powers of two",
    "wide range",
    "quantized before",
    "midpoints",
)


@dataclass(frozen=True)
class Source:
    """Source values as they lie on disk, and what they are."""

    name: str
    dtype: str
    raw: npt.NDArray[Any]
    wide: npt.NDArray[np.float32]


def to_source(name: str, dtype: str, values: npt.NDArray[np.float32]) -> Source:
    """Round `values` to `dtype`, without the code under test."""
    if dtype == "F32":
        return Source(name, dtype, values, values)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = np.clip(values, -65504, 65504).astype(np.float16)
        return Source(name, dtype, half, half.astype(np.float32))
    bits = values.view(np.uint32)
    raw = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Source(name, dtype, raw, (raw.astype(np.uint32) << 16).view(np.float32))


@pytest.fixture(params=[f"{name}, {dtype}" for name in CLASSES for dtype in ("BF16", "F16", "F32")])
def source(request: pytest.FixtureRequest) -> Source:
    name, _, dtype = request.param.rpartition(", ")
    return to_source(name, dtype, values_of(name))


@pytest.fixture
def make_source() -> Callable[[str, str], Source]:
    """Source values of one class and dtype."""
    return lambda name, dtype: to_source(name, dtype, values_of(name))
