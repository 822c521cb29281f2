"""The number formats that a weight may be stored in, by the names that recipes and ``--component`` use.

Only names and sizes stand here, so that a plan needs no arithmetic.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Scheme(StrEnum):
    """How the weight of a linear layer is stored. Activations stay wide in all of them unless a recipe says otherwise."""

    NVFP4 = "nvfp4"
    """E2M1 codes, an E4M3 scale for 16 values, a float32 scale for the tensor: 4.5 bits a weight."""
    MXFP4 = "mxfp4"
    """E2M1 codes, a power-of-two (E8M0) scale for 32 values: 4.25 bits a weight."""
    FP8 = "fp8"
    """E4M3 codes, one float scale for each output channel: 8 bits a weight."""
    INT8 = "int8"
    """Integers from -127 to 127, one float scale for each output channel: 8 bits a weight."""
    WIDE = "bf16"
    """Left as it is: BF16 in nearly every checkpoint, and untouched where it is another type."""

    @property
    def is_wide(self) -> bool:
        """Whether the weight is left as it is."""
        return self is Scheme.WIDE

    @property
    def block_size(self) -> int:
        """Values along the input dimension that share a scale; 0: all of a row, or the weight is wide."""
        return BLOCK_SIZES.get(self, 0)

    @property
    def width_multiple(self) -> int:
        """What the width of a weight must be a multiple of."""
        return WIDTH_MULTIPLES.get(self, 1)

    @property
    def code_bits(self) -> int:
        """Bits of one code; 16 for a wide weight, whatever its type."""
        return CODE_BITS[self]


BLOCK_SIZES: Final = {Scheme.NVFP4: 16, Scheme.MXFP4: 32}

WIDTH_MULTIPLES: Final = {**BLOCK_SIZES, Scheme.INT8: 4}
"""Whole blocks; and INT8 is stored four to a 32-bit word."""

CODE_BITS: Final = {Scheme.NVFP4: 4, Scheme.MXFP4: 4, Scheme.FP8: 8, Scheme.INT8: 8, Scheme.WIDE: 16}
