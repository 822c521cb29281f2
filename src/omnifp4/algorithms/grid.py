"""The NVFP4 grid in torch: the arithmetic of `omnifp4.formats.reference`, bit for bit, on any device."""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnifp4.formats.nvfp4 import (
    BLOCK_SIZE,
    E2M1_MAGNITUDES,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_MAX_BITS,
    E4M3_MIN_BITS,
    E4M3_VALUES,
    ScaleRule,
)
from omnifp4.formats.reference import tensor_scale_for

_MIDDLES: Final = (E2M1_MAGNITUDES[:-1] + E2M1_MAGNITUDES[1:]) / 2
_UPPER_ENDS: Final = torch.from_numpy(np.where(np.arange(7) % 2, np.nextafter(_MIDDLES, np.float32(0)), _MIDDLES))
"""The largest magnitude that goes to each code but the last; a tie goes to the even code."""


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """On a device, once: upper ends, values of E2M1 codes, values of E4M3 bits. A copy for every use would make it wait."""
    codes, bits = (torch.from_numpy(table.copy()).to(device) for table in (E2M1_VALUES, E4M3_VALUES))
    return _UPPER_ENDS.to(device), codes, bits


class Codes(NamedTuple):
    """A rounded weight.

    Attributes:
        codes: uint8 0..15 ``[..., out, in]``.
        block_scale: E4M3 bits, uint8 ``[..., out, in / 16]``.
        tensor_scale: float32 ``[...]``.
    """

    codes: Tensor
    block_scale: Tensor
    tensor_scale: Tensor


def e4m3_values(bits: Tensor) -> Tensor:
    """What E4M3 bits stand for: uint8 to float32 of the same shape."""
    return _tables(bits.device)[2][bits.long()]


def round_to_e4m3(values: Tensor) -> Tensor:
    """Round non-negative values to E4M3 bits, ties to even, held within [2**-9, 448]: float32 to uint8."""
    bits = values.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8) & 0x7F
    return bits.clamp_(E4M3_MIN_BITS, E4M3_MAX_BITS)


def round_to_e2m1(values: Tensor) -> Tensor:
    """Round to the nearest code, ties to the even code, beyond 6 to 6: float32 to uint8 0..15 of the same shape."""
    nearest = torch.bucketize(values.abs(), _tables(values.device)[0], out_int32=True)
    return (nearest + 8 * torch.signbit(values)).to(torch.uint8)


def e2m1_values(codes: Tensor) -> Tensor:
    """What codes stand for: uint8 to float32 of the same shape."""
    return _tables(codes.device)[1][codes.long()]


def blocks_of(weight: Tensor) -> Tensor:
    """View ``[..., out, in]`` as ``[..., out, in / 16, 16]``."""
    return weight.reshape(*weight.shape[:-1], -1, BLOCK_SIZE)


def column_scale(block_scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """What each value's code is multiplied by: float32 ``[..., out, in]``."""
    scale = e4m3_values(block_scale) * tensor_scale[..., None, None]
    return scale.repeat_interleave(BLOCK_SIZE, dim=-1)


def encode(weight: Tensor, block_scale: Tensor, tensor_scale: Tensor) -> Codes:
    """Round every value of float32 ``[..., out, in]`` to the nearest under given scales."""
    return Codes(round_to_e2m1(weight / column_scale(block_scale, tensor_scale)), block_scale, tensor_scale)


def decode(rounded: Codes) -> Tensor:
    """The float32 ``[..., out, in]`` values that codes and scales stand for."""
    return e2m1_values(rounded.codes) * column_scale(rounded.block_scale, rounded.tensor_scale)


def tensor_scales(amax: Tensor, rule: ScaleRule) -> Tensor:
    """Tensor scales, float32 ``[...]``, for the largest magnitudes ``[...]`` of weights or of groups that share one.

    Raises:
        ValueError: a magnitude is NaN, infinite, or too large to encode.
    """
    scales = [tensor_scale_for(value, rule) for value in amax.double().reshape(-1).tolist()]
    return torch.from_numpy(np.array(scales, dtype=np.float32)).reshape(amax.shape).to(amax.device)


def max_block_scales(weight: Tensor, tensor_scale: Tensor) -> Tensor:
    """The block scales of max scaling, E4M3 bits uint8 ``[..., out, in / 16]``: the largest value becomes 6."""
    amax = blocks_of(weight).abs().amax(dim=-1)
    return round_to_e4m3(amax / (torch.tensor(E2M1_MAX) * tensor_scale)[..., None, None])
