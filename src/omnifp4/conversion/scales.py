"""Tensor scales from factor to divisor and back, so that no decoded weight changes.

ModelOpt multiplies, ``bf16(code * (block_scale * factor))``; compressed-tensors divides,
``bf16(code * (block_scale / divisor))``, all in float32. For powers of two these are the same numbers. For others the
reciprocal is rounded, and a product that lies halfway between two BF16 numbers may then fall to the other side. The
products are few (126 block scales times 7 magnitudes), so they are all compared, and a neighbouring float32 number is
taken where it does better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from omnifp4.formats.fast_cpu import bf16_bits, effective_scale
from omnifp4.formats.nvfp4 import E2M1_MAGNITUDES, E4M3_MAX_BITS, E4M3_MIN_BITS

NEIGHBOURS: Final = (0, 1, -1, 2, -2)
"""Distances from the nearest reciprocal that are tried, in float32 steps."""

SHORT_BITS: Final = 12
"""A number with as many trailing zero bits was stated by a person or computed in BF16; it is preferred."""

BLOCK_SCALES: Final = np.arange(E4M3_MIN_BITS, E4M3_MAX_BITS + 1, dtype=np.uint8)

DecodedTable = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class TranslatedScale:
    """A tensor scale in the other dialect.

    Attributes:
        value: float32 to be stored.
        exact: both are powers of two.
        nudged: it is not the nearest reciprocal.
        same_values: every product decodes to the same BF16 number; where not, some weights may differ by one step.
    """

    value: np.float32
    exact: bool
    nudged: bool
    same_values: bool


def decoded_table(stored: np.float32, *, reciprocal: bool) -> DecodedTable:
    """BF16 bits of every positive product: uint16 ``[126, 7]``, by block scale (from 0x01) and code (from 1).

    Args:
        stored: the tensor scale as the checkpoint has it.
        reciprocal: it divides.
    """
    scale = effective_scale(BLOCK_SCALES, stored, reciprocal=reciprocal)
    return bf16_bits(scale[:, None] * E2M1_MAGNITUDES[None, 1:])


@lru_cache(maxsize=1 << 17)
def translate(stored: np.float32, *, reciprocal: bool) -> TranslatedScale:
    """The number that the other dialect stores.

    Args:
        stored: finite and positive, far enough from float32's ends that its reciprocal is normal.
        reciprocal: `stored` divides, so the result multiplies; or the other way round.
    """
    if math.frexp(stored)[0] == 0.5:
        return TranslatedScale(np.float32(1.0) / stored, True, False, True)
    wanted = decoded_table(stored, reciprocal=reciprocal)
    found = []
    for distance, candidate in candidates(stored):
        differing = int(np.count_nonzero(decoded_table(candidate, reciprocal=not reciprocal) != wanted))
        found.append((differing, not is_short(candidate), abs(distance), distance, candidate))
    differing, _, _, distance, value = min(found, key=lambda item: item[:4])
    return TranslatedScale(value, False, distance != 0, differing == 0)


def candidates(stored: np.float32) -> list[tuple[int, np.float32]]:
    """The nearest reciprocal and its neighbours, with their distance from it."""
    nearest = (np.float32(1.0) / stored).view(np.uint32)
    return [(distance, np.uint32(int(nearest) + distance).view(np.float32)) for distance in NEIGHBOURS]


def translate_input(stored: np.float32) -> np.float32:
    """The reciprocal of an input scale: the nearest, unless a neighbour is a short number."""
    found = candidates(stored)
    return next((value for distance, value in found if abs(distance) < 2 and is_short(value)), found[0][1])


def is_short(value: np.float32) -> bool:
    """Whether a number ends in many zero bits."""
    return int(value.view(np.uint32)) & ((1 << SHORT_BITS) - 1) == 0
