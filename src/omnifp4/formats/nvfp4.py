"""NVFP4: four bits a value, one E4M3 scale for 16 values, one float32 scale for the tensor.

A value is a sign and an E2M1 magnitude out of {0, 0.5, 1, 1.5, 2, 3, 4, 6}. Sixteen consecutive values along the
input dimension (the last one of a ``[out, in]`` weight) share a **block scale** in E4M3 (float8_e4m3fn, at most 448);
the whole tensor, or the group of tensors that a kernel fuses, shares a float32 **tensor scale**:

    weight[r, c]  ~  e2m1[codes[r, c]] * block_scale[r, c // 16] * tensor_scale

That is 4.5 bits a weight. Two codes share a byte; the even column is in the low nibble.

Only numpy is imported here, so that a plan or a proof on a small machine needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK_SIZE: Final = 16
"""Consecutive values along the input dimension that share a block scale."""

E2M1_MAGNITUDES: Final = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)
"""The magnitude of codes 0 to 7; codes 8 to 15 are their negatives."""

E2M1_VALUES: Final = np.concatenate([E2M1_MAGNITUDES, -E2M1_MAGNITUDES])
"""The value of each of the 16 codes; code 8 is negative zero."""

E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0

E4M3_MAX_BITS: Final = 0x7E
"""Bits of 448, the largest finite E4M3 number; 0x7F is NaN."""

E4M3_MIN_BITS: Final = 0x01
"""Bits of 2**-9, the smallest positive E4M3 number. No block scale is smaller: some loaders would divide by zero."""

AMAX_LIMIT: Final = 2.0**126
"""Largest magnitude that can be encoded; beyond it a decoded value could overflow float32."""

TENSOR_SCALE_MIN: Final = 2.0**-100
"""Smallest tensor scale. It keeps every product a normal float32 number; weights this small round to zero."""

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


class ScaleRule(StrEnum):
    """How the scales are chosen from the weights alone."""

    MAX = "max"
    """The largest value of a block becomes 6: what other tools write. Tensor scale amax / (6 * 448)."""
    FOUR_OVER_SIX = "four-over-six"
    """The largest value becomes 6 or 4, whichever errs less (arXiv 2512.02010). Tensor scale amax / (6 * 256)."""
    SWEEP = "sweep"
    """Eleven neighbouring E4M3 scales are tried and the least squared error wins (arXiv 2606.07618).

    Tensor scale amax / (6 * 256), rounded up to a power of two. That costs nothing measurable (Gaussian weights
    6.60e-3 either way, uniform 6.15e-3 against 6.17e-3) and buys exactness: a power of two has an exact reciprocal, so
    both dialects hold the same number, and code * block_scale * tensor_scale has six significant bits, so the
    decoded weight is exact in BF16 in whatever order a library multiplies.
    """


SCALE_HEADROOM: Final[dict[ScaleRule, float]] = {
    ScaleRule.MAX: 448.0,
    ScaleRule.FOUR_OVER_SIX: 256.0,
    ScaleRule.SWEEP: 256.0,
}
"""The block scale that the block with the tensor's largest value gets: 448 is the ceiling, 256 leaves room above."""

SWEEP_OFFSETS: Final = (-3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
"""Candidates of the sweep, as distances in E4M3 codes from the scale that max scaling gives."""

EXPECTED_RELATIVE_ERROR: Final[dict[ScaleRule, float]] = {
    ScaleRule.MAX: 9.05e-3,
    ScaleRule.FOUR_OVER_SIX: 7.56e-3,
    ScaleRule.SWEEP: 6.60e-3,
}
"""Relative squared error, sum((w - w')**2) / sum(w**2), of each rule on Gaussian weights."""


def _e4m3_table() -> Float32Array:
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits & 0x80, -magnitude, magnitude).astype(np.float32)


E4M3_VALUES: Final = _e4m3_table()
"""The value of each of the 256 E4M3 bit patterns (0x7F and 0xFF are NaN)."""


@dataclass(frozen=True, slots=True)
class NVFP4Tensor:
    """A weight in NVFP4.

    Attributes:
        packed: codes, two a byte, uint8 ``[out, in / 2]``.
        block_scale: E4M3 bits, uint8 ``[out, in / 16]``.
        tensor_scale: float32, multiplies every block scale.
    """

    packed: UInt8Array
    block_scale: UInt8Array
    tensor_scale: np.float32

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight it stands for, ``(out, in)``."""
        return self.packed.shape[0], self.packed.shape[1] * 2


class EncodeStats(NamedTuple):
    """Damage done by an encoding.

    Attributes:
        squared_error: ``sum((w - w')**2)``.
        energy: ``sum(w**2)``.
    """

    squared_error: float
    energy: float


def pack(codes: UInt8Array) -> UInt8Array:
    """Put two codes in a byte, the even column low: uint8 ``[..., n]`` of 0..15 to uint8 ``[..., n / 2]``."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def unpack(packed: UInt8Array) -> UInt8Array:
    """Inverse of `pack`: uint8 ``[..., n / 2]`` to codes uint8 ``[..., n]``."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    codes[..., 0::2] = packed & 0x0F
    codes[..., 1::2] = packed >> 4
    return codes
