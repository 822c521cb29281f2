"""Linear layers and fused experts whose weights stay packed in NVFP4 while they run.

Their buffers are plain numbers and bytes, so that moving a model to a device moves them, and casting a model to
another dtype does not touch them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.runtime.backends import Backend, backend_for


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One NVFP4 matrix in memory.

    Attributes:
        packed: codes, uint8 ``[out, in / 2]``, the even column in the low nibble.
        block_scale: E4M3 bits, uint8 ``[out, in / 16]``.
        tensor_scale: float32, one value, as the checkpoint stores it.
        reciprocal: `tensor_scale` divides the block scales instead of multiplying them.
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor
    reciprocal: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.packed.shape[0], self.packed.shape[1] * 2


class PackedModule(nn.Module):
    """A module whose buffers hold packed weights.

    Until `finish_loading` the buffers are not part of the state dict: Transformers' loader would call them missing and
    write fresh memory over them.
    """

    def __init__(self, backend: str, reciprocal: bool) -> None:
        """`backend` is a name as `choose_backend` takes it."""
        super().__init__()
        self.requested_backend = backend
        self.reciprocal = reciprocal
        # Transformers must not initialize it.
        self._is_hf_initialized = True

    def _add_buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"), persistent=False)

    def finish_loading(self) -> None:
        """The weights are there: make them part of the state dict."""
        self._non_persistent_buffers_set.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Scales are float32 by definition; `model.to(torch.bfloat16)` must move them and not round them.
        kept = {
            name: buffer for name, buffer in self._buffers.items() if buffer is not None and buffer.is_floating_point()
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class NVFP4Linear(PackedModule):
    """A linear layer with a packed weight; takes the place of an `nn.Linear`.

    Buffers: ``packed`` uint8 ``[out, in / 2]``, ``block_scale`` uint8 (E4M3 bits) ``[out, in / 16]``, ``tensor_scale``
    float32 ``[]`` and, where the checkpoint has one, ``input_scale`` float32 ``[]``; both as the checkpoint stores them.
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor
    input_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, wide: nn.Linear, backend: str, *, reciprocal: bool, input_scale: bool) -> None:
        """Take the shape and the bias of `wide`, whose weight is dropped."""
        super().__init__(backend, reciprocal)
        self.in_features, self.out_features = wide.in_features, wide.out_features
        self._add_buffer("packed", (wide.out_features, wide.in_features // 2), torch.uint8)
        self._add_buffer("block_scale", (wide.out_features, wide.in_features // BLOCK_SIZE), torch.uint8)
        self._add_buffer("tensor_scale", (), torch.float32)
        if input_scale:
            self._add_buffer("input_scale", (), torch.float32)
        else:
            self.register_buffer("input_scale", None, persistent=False)
        self.register_parameter("bias", wide.bias)

    @property
    def backend(self) -> Backend:
        """What runs the weight where it is now."""
        return backend_for(self.packed.device, self.requested_backend)

    def packed_weight(self) -> PackedWeight:
        """The weight as the backend takes it."""
        return PackedWeight(self.packed, self.block_scale, self.tensor_scale, self.reciprocal)

    @property
    def weight(self) -> Tensor:
        """The weight unpacked, fresh at every access: BF16 ``[out, in]``. For code that reads ``.weight``; slow."""
        return self.backend.dequantize(self.packed_weight(), torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of `x`."""
        return self.backend.linear(x, self.packed_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedExperts(PackedModule):
    """The routed experts of a layer, packed; takes the place of Transformers' fused 3-D experts.

    Buffers, for E experts of width I over a hidden width H: ``gate_up_packed`` uint8 ``[E, 2 I, H / 2]``,
    ``gate_up_block_scale`` uint8 ``[E, 2 I, H / 16]``, ``gate_up_tensor_scale`` float32 ``[E]`` (gate and up share it),
    ``down_packed`` ``[E, H, I / 2]``, ``down_block_scale`` ``[E, H, I / 16]``, ``down_tensor_scale`` ``[E]``; and in
    W4A4 ``gate_up_input_scale`` ``[E, 2]`` and ``down_input_scale`` ``[E]``.
    """

    gate_up_packed: Tensor
    gate_up_block_scale: Tensor
    gate_up_tensor_scale: Tensor
    down_packed: Tensor
    down_block_scale: Tensor
    down_tensor_scale: Tensor

    def __init__(self, wide: Any, backend: str, *, reciprocal: bool, input_scale: bool) -> None:
        """Take shapes and activation of `wide`, a module with ``gate_up_proj [E, 2 I, H]`` and ``down_proj [E, H, I]``."""
        super().__init__(backend, reciprocal)
        experts, hidden, inner = wide.down_proj.shape
        self.num_experts, self.hidden_dim, self.intermediate_dim = int(experts), int(hidden), int(inner)
        self.activate: Callable[[Tensor], Tensor] = wide.act_fn
        for part, rows, columns in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
            self._add_buffer(f"{part}_packed", (experts, rows, columns // 2), torch.uint8)
            self._add_buffer(f"{part}_block_scale", (experts, rows, columns // BLOCK_SIZE), torch.uint8)
            self._add_buffer(f"{part}_tensor_scale", (experts,), torch.float32)
            if input_scale:
                self._add_buffer(
                    f"{part}_input_scale", (experts, 2) if part == "gate_up" else (experts,), torch.float32
                )

    @property
    def backend(self) -> Backend:
        """What runs the experts where they are now."""
        return backend_for(self.down_packed.device, self.requested_backend)

    def gate_up(self, expert: int) -> PackedWeight:
        """Gate over up of one expert, ``[2 I, H]``."""
        return PackedWeight(
            self.gate_up_packed[expert],
            self.gate_up_block_scale[expert],
            self.gate_up_tensor_scale[expert],
            self.reciprocal,
        )

    def down(self, expert: int) -> PackedWeight:
        """Down of one expert, ``[H, I]``."""
        return PackedWeight(
            self.down_packed[expert], self.down_block_scale[expert], self.down_tensor_scale[expert], self.reciprocal
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mix the outputs of the routed experts.

        Args:
            hidden_states: ``[tokens, H]``.
            top_k_index: expert numbers, int64 ``[tokens, k]``.
            top_k_weights: ``[tokens, k]``.

        Returns:
            ``[tokens, H]`` in the dtype of `hidden_states`.
        """
        return self.backend.experts(self, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.hidden_dim}, inner={self.intermediate_dim}"
