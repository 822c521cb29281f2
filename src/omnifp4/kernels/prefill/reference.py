"""What the kernels beside this compute, in plain PyTorch and a precision of choice; slow, and on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnifp4.formats.nvfp4 import E2M1_VALUES, E4M3_VALUES
from omnifp4.kernels.prefill.matrices import PackedMatrices


def unpacked(weight: PackedMatrices, expert: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """code * block scale * tensor scale of one expert: ``[out, in]`` in `dtype`, nothing rounded before it."""
    device = weight.packed.device
    codes = weight.packed[expert].long()
    values = torch.from_numpy(E2M1_VALUES).to(device, dtype)
    both = torch.stack([values[codes & 15], values[codes >> 4]], dim=-1).flatten(-2)
    block = torch.from_numpy(E4M3_VALUES).to(device, dtype)[weight.block_scale[expert].long()]
    tensor_scale = weight.tensor_scale[expert].to(dtype)
    scale = block / tensor_scale if weight.reciprocal else block * tensor_scale
    return both * scale.repeat_interleave(16, dim=-1)


def linear(x: Tensor, weight: PackedMatrices, bias: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """x @ W.T + bias: x ``[tokens, in]``, one matrix ``[1, out, in]``, to ``[tokens, out]`` in `dtype`."""
    return F.linear(x.to(dtype), unpacked(weight, 0, dtype), None if bias is None else bias.to(dtype))


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: PackedMatrices,
    down: PackedMatrices,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """sum over places p of weights[t, p] * down(silu(gate(x)) * up(x)) of expert index[t, p].

    Args:
        hidden: ``[tokens, H]``.
        index: ``[tokens, k]``; a number outside of ``0 ... E - 1`` is no expert and counts nothing.
        weights: ``[tokens, k]``.
        gate_up: ``[E, 2 I, H]``.
        down: ``[E, H, I]``.
        dtype: of all arithmetic.

    Returns:
        ``[tokens, H]`` in `dtype`.
    """
    mixed = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    for expert in range(gate_up.shape[0]):
        token, place = torch.where(index == expert)
        gate, up = (hidden[token].to(dtype) @ unpacked(gate_up, expert, dtype).T).chunk(2, dim=-1)
        output = (F.silu(gate) * up) @ unpacked(down, expert, dtype).T
        mixed.index_add_(0, token, output * weights[token, place, None].to(dtype))
    return mixed
