"""Packed weights as wide ones, near the speed of a copy."""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

from omnifp4.kernels.prefill import kernels

WORDS_PER_PROGRAM: Final = 1024


def dequantize(
    packed: Tensor, block_scale: Tensor, tensor_scale: Tensor, reciprocal: bool, dtype: torch.dtype
) -> Tensor:
    """code * (block scale * tensor scale) in float32, rounded once; the bits of `TorchBackend.dequantize`.

    Args:
        packed: codes, uint8 ``[(E,) out, in / 2]``, contiguous, `in` a multiple of 16.
        block_scale: E4M3 bits, uint8 ``[(E,) out, in / 16]``, contiguous.
        tensor_scale: float32, one value or ``[E]``.
        reciprocal: `tensor_scale` divides.
        dtype: bfloat16, float16 or float32.

    Returns:
        ``[(E,) out, in]`` in `dtype`.
    """
    *batch, rows, half = packed.shape
    check_layout(packed, block_scale, tensor_scale)
    out = torch.empty((*batch, rows, 2 * half), dtype=dtype, device=packed.device)
    matrices = batch[0] if batch else 1
    words = rows * half // 4
    kernels.dequantize_kernel[(triton.cdiv(words, WORDS_PER_PROGRAM), matrices)](
        packed.view(torch.int32),
        block_scale,
        tensor_scale,
        out,
        words,
        RECIPROCAL=reciprocal,
        WORDS=WORDS_PER_PROGRAM,
        num_warps=4,
    )
    return out


def check_layout(packed: Tensor, block_scale: Tensor, tensor_scale: Tensor) -> None:
    """Refuse tensors that are not one NVFP4 matrix or a batch of them.

    Raises:
        ValueError: a shape, dtype or stride is not as `dequantize` says.
    """
    if packed.ndim not in (2, 3) or packed.shape[-1] % 8:
        raise ValueError(f"packed {tuple(packed.shape)} is not [(E,) out, in / 2] with in a multiple of 16")
    if block_scale.shape != (*packed.shape[:-1], packed.shape[-1] // 8):
        raise ValueError(f"packed {tuple(packed.shape)} and block_scale {tuple(block_scale.shape)} do not fit")
    if packed.dtype != torch.uint8 or block_scale.dtype != torch.uint8 or tensor_scale.dtype != torch.float32:
        raise ValueError(
            f"packed {packed.dtype}, block_scale {block_scale.dtype}, tensor_scale {tensor_scale.dtype}: "
            "uint8, uint8 and float32 are needed"
        )
    if not (packed.is_contiguous() and block_scale.is_contiguous() and tensor_scale.is_contiguous()):
        raise ValueError("packed weights must be contiguous")
    if tensor_scale.numel() != (packed.shape[0] if packed.ndim == 3 else 1):
        raise ValueError(f"tensor_scale {tuple(tensor_scale.shape)} does not fit packed {tuple(packed.shape)}")
