"""What runs packed weights: the one seam where kernels plug in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from omnifp4.runtime.packed import PackedExperts, PackedWeight


class Backend(ABC):
    """Arithmetic on packed weights.

    A backend must unpack (`dequantize`); the rest follows from that. One with kernels of its own overrides `linear`
    and `experts`.
    """

    name: str
    capturable: bool = False
    """Its work never asks the host and waits for nothing, so that a CUDA graph can hold it."""

    @abstractmethod
    def dequantize(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """The matrix as ``[out, in]`` in `dtype`: code * (block scale * tensor scale) in float32, rounded once."""

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``[..., in]`` to ``[..., out]``, unpacking the weight to the dtype of `x`."""
        return F.linear(x, self.dequantize(weight, x.dtype), bias)

    def experts(self, module: PackedExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Mix the outputs of the routed experts, one expert after the other; only one is unpacked at a time.

        Args:
            module: the experts.
            hidden: ``[tokens, H]``.
            index: expert of each slot, int64 ``[tokens, k]``.
            weights: ``[tokens, k]``.
        """
        mixed = torch.zeros_like(hidden)
        slots = index.reshape(-1)
        # Slots in order of expert, then of position and token: the order in which Transformers' eager loop adds.
        order = torch.argsort(index.t().reshape(-1), stable=True)
        counts = torch.bincount(slots, minlength=module.num_experts).tolist()
        begin = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            chosen = order[begin : begin + count]
            begin += count
            if expert >= module.num_experts:
                # Routed to no expert at all: Transformers numbers such slots behind the last one.
                break
            position, token = chosen // index.shape[0], chosen % index.shape[0]
            gate, up = self.linear(hidden[token], module.gate_up(expert)).chunk(2, dim=-1)
            output = self.linear(module.activate(gate) * up, module.down(expert))
            output = output * weights[token, position, None]
            mixed.index_add_(0, token, output.to(mixed.dtype))
        return mixed
