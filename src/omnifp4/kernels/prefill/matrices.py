"""Packed matrices as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedMatrices:
    """One NVFP4 matrix for each expert, as `omnifp4.runtime.packed.PackedExperts` holds them.

    Attributes:
        packed: uint8 ``[E, out, in / 2]``.
        block_scale: E4M3 bits, uint8 ``[E, out, in / 16]``, none negative or NaN (loading refuses those).
        tensor_scale: float32 ``[E]``.
        reciprocal: `tensor_scale` divides.
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor
    reciprocal: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(E, out, in)``."""
        return self.packed.shape[0], self.packed.shape[1], self.packed.shape[2] * 2
