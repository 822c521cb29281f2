"""Packed weights on a CUDA GPU through the Triton kernels of `omnifp4.kernels.prefill`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from omnifp4.runtime.backends.base import Backend

if TYPE_CHECKING:
    from omnifp4.runtime.packed import PackedExperts, PackedWeight

KERNEL_TYPES: Final = (torch.bfloat16, torch.float16)


class TritonBackend(Backend):
    """See `Backend`. Weights unpack at the speed of memory, and experts never leave their packed form.

    Sums run in float32 and in a fixed order; the host waits for nothing, so that a CUDA graph can hold all of it.
    Experts in float32, with branches, or gated with something else than SiLU, run one after the other as `Backend.experts` does.
    """

    name = "triton"

    def dequantize(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """See `Backend.dequantize`; the same bits."""
        from omnifp4.kernels.prefill.unpacking import dequantize

        return dequantize(weight.packed, weight.block_scale, weight.tensor_scale, weight.reciprocal, dtype)

    def experts(self, module: PackedExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """See `Backend.experts`."""
        if hidden.dtype not in KERNEL_TYPES or not _is_silu(module.activate) or module.has_branch:
            return super().experts(module, hidden, index, weights)
        from omnifp4.kernels.prefill.experts import experts
        from omnifp4.kernels.prefill.matrices import PackedMatrices

        gate_up = PackedMatrices(
            module.gate_up_packed, module.gate_up_block_scale, module.gate_up_tensor_scale, module.reciprocal
        )
        down = PackedMatrices(module.down_packed, module.down_block_scale, module.down_tensor_scale, module.reciprocal)
        return experts(hidden, index, weights, gate_up, down)


def _is_silu(activate: object) -> bool:
    return activate is F.silu or isinstance(activate, torch.nn.SiLU) or type(activate).__name__ == "SiLUActivation"
