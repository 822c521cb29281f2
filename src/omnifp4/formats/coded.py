"""The formats beside NVFP4 behind one door: codes and one array of scales, row by row.

The scales of a row depend on that row alone, so a weight may be encoded in ranges of rows, and linears that kernels
fuse need to share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.formats import fp8, int8, mxfp4
from omnifp4.formats.nvfp4 import EncodeStats, Float32Array, ScaleRule
from omnifp4.formats.scheme import Scheme

CODED_SCHEMES: Final = (Scheme.MXFP4, Scheme.FP8, Scheme.INT8)
"""Schemes of this module, smallest first."""

EXPECTED_RELATIVE_ERROR: Final = {Scheme.MXFP4: 13.3e-3, Scheme.FP8: 0.700e-3, Scheme.INT8: 0.0686e-3}
"""Relative squared error of `ScaleRule.MAX` on Gaussian weights, 2,048 to a row."""

CHUNK_VALUES: Final = 1 << 18
"""Float32 values that are encoded at a time: twice as fast as a matrix of 4 M at once, measured on 2,048 columns."""

_FORMATS: Final[dict[Scheme, ModuleType]] = {Scheme.MXFP4: mxfp4, Scheme.FP8: fp8, Scheme.INT8: int8}


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A weight in FP8, MXFP4 or INT8.

    Attributes:
        scheme: which of them.
        codes: FP8: E4M3 bits, uint8 ``[out, in]``; INT8: int8 ``[out, in]``; MXFP4: uint8 ``[out, in / 2]``.
        scale: FP8 and INT8: float32 ``[out]``, or ``[1]`` for the whole tensor; MXFP4: E8M0 bits, uint8 ``[out, in / 32]``.
    """

    scheme: Scheme
    codes: npt.NDArray[Any]
    scale: npt.NDArray[Any]


def encode(weight: Float32Array, scheme: Scheme, rule: ScaleRule = ScaleRule.SWEEP) -> CodedTensor:
    """Encode float32 ``[out, in]``.

    Raises:
        ValueError: the shape does not fit the scheme, or a value is NaN, infinite or too large.
    """
    form = _FORMATS[scheme]
    scale = form.choose_scales(weight, rule)
    return CodedTensor(scheme, form.encode_codes(weight, scale), scale)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows of about `CHUNK_VALUES` values, which the arithmetic passes over without leaving the cache."""
    step = max(1, CHUNK_VALUES // max(1, columns))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def choose_scales(weight: Float32Array, scheme: Scheme, rule: ScaleRule) -> npt.NDArray[Any]:
    """The scales of a weight under a rule; errors as `encode`."""
    return np.asarray(_FORMATS[scheme].choose_scales(weight, rule))


def encode_codes(weight: Float32Array, scheme: Scheme, scale: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The codes of a weight under given scales."""
    return np.asarray(_FORMATS[scheme].encode_codes(weight, scale))


def decode(tensor: CodedTensor) -> Float32Array:
    """The float32 ``[out, in]`` values that codes and scales stand for."""
    return np.asarray(_FORMATS[tensor.scheme].decode(tensor.codes, tensor.scale), dtype=np.float32)


def error_of(weight: Float32Array, decoded: Float32Array) -> EncodeStats:
    """Squared error of decoded values, and the weight's energy."""
    difference = (weight - decoded).astype(np.float64)
    energy = np.square(weight, dtype=np.float64).sum()
    return EncodeStats(float(np.square(difference).sum()), float(energy))
