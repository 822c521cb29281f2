"""What runs packed weights: the one seam where kernels plug in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from omnifp4.runtime.packed import PackedExperts, PackedWeight


Weight = TypeVar("Weight")
Read = TypeVar("Read", covariant=True)


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
        y = F.linear(x, self.dequantize(weight, x.dtype), bias)
        return y if weight.branch is None else y + weight.branch.outputs(x)

    def whole(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """`dequantize`, with the branch added that is otherwise computed beside it."""
        if weight.branch is None:
            return self.dequantize(weight, dtype)
        return (self.dequantize(weight, torch.float32) + weight.branch.product()).to(dtype)

    def experts(self, module: PackedExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Mix the outputs of the routed experts, one expert after the other; only one is unpacked at a time.

        Args:
            module: the experts.
            hidden: ``[tokens, H]``.
            index: expert of each slot, int64 ``[tokens, k]``.
            weights: ``[tokens, k]``.
        """
        return mix_experts(module, self.linear, hidden, index, weights)


class ExpertWeights(Protocol[Read]):
    """Routed experts of a layer, one matrix at a time."""

    num_experts: int
    activate: Callable[[Tensor], Tensor]

    def gate_up(self, expert: int) -> Read:
        """Gate over up of one expert, ``[2 I, H]``."""
        ...

    def down(self, expert: int) -> Read:
        """Down of one expert, ``[H, I]``."""
        ...


def mix_experts(
    module: ExpertWeights[Weight],
    linear: Callable[[Tensor, Weight], Tensor],
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """Mix the outputs of the routed experts, one expert after the other, see `Backend.experts`; `linear` multiplies."""
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
        gate, up = linear(hidden[token], module.gate_up(expert)).chunk(2, dim=-1)
        output = linear(module.activate(gate) * up, module.down(expert))
        output = output * weights[token, position, None]
        mixed.index_add_(0, token, output.to(mixed.dtype))
    return mixed
