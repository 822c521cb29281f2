"""Linear layers and fused experts whose weights stay packed in NVFP4 while they run.

Their buffers are plain numbers and bytes, so that moving a model to a device moves them, and casting a model to
another dtype does not touch them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.runtime.backends import Backend, backend_for


class Branch(NamedTuple):
    """A low-rank part beside a packed matrix, for each of the linears that stand over each other in it.

    Attributes:
        up: BF16 ``[linears, out / linears, rank]``.
        down: BF16 ``[linears, rank, in]``.
    """

    up: Tensor
    down: Tensor

    def outputs(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of `x`."""
        parts = [
            functional.linear(functional.linear(x, down.to(x.dtype)), up.to(x.dtype))
            for up, down in zip(self.up, self.down, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def product(self) -> Tensor:
        """The matrix that it stands for, float32 ``[out, in]``."""
        return (self.up.float() @ self.down.float()).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One NVFP4 matrix in memory.

    Attributes:
        packed: codes, uint8 ``[out, in / 2]``, the even column in the low nibble.
        block_scale: E4M3 bits, uint8 ``[out, in / 16]``.
        tensor_scale: float32, one value, as the checkpoint stores it.
        reciprocal: `tensor_scale` divides the block scales instead of multiplying them.
        branch: is computed beside it; None where there is none.
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor
    reciprocal: bool
    branch: Branch | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.packed.shape[0], self.packed.shape[1] * 2


class PackedModule(nn.Module):
    """A module whose buffers hold packed weights.

    Until `finish_loading` the buffers are not part of the state dict: Transformers' loader would call them missing and
    write fresh memory over them.
    """

    def __init__(self, backend: str) -> None:
        """`backend` is a name as `choose_backend` takes it."""
        super().__init__()
        self.requested_backend = backend
        # Transformers must not initialize it.
        self._is_hf_initialized = True

    def _add_buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"), persistent=False)

    def _add_branch(
        self, name: str, linears: int, rows: int, rank: int, columns: int, lead: tuple[int, ...] = ()
    ) -> None:
        self._add_buffer(f"{name}_up", (*lead, linears, rows, rank), torch.bfloat16)
        self._add_buffer(f"{name}_down", (*lead, linears, rank, columns), torch.bfloat16)

    def _branch(self, name: str, expert: int | None = None) -> Branch | None:
        up, down = self._buffers.get(f"{name}_up"), self._buffers.get(f"{name}_down")
        if up is None or down is None:
            return None
        return Branch(up, down) if expert is None else Branch(up[expert], down[expert])

    @property
    def has_branch(self) -> bool:
        """Whether low-rank parts are computed beside the packed weights, which only this runtime does."""
        return any(name.endswith("branch_up") for name in self._buffers)

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
    With a branch of rank r beside it ``branch_up`` BF16 ``[1, out, r]`` and ``branch_down`` ``[1, r, in]``.
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor
    input_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, wide: nn.Linear, backend: str, *, reciprocal: bool, input_scale: bool, rank: int = 0) -> None:
        """Take the shape and the bias of `wide`, whose weight is dropped; `rank` is that of a branch."""
        super().__init__(backend)
        self.reciprocal = reciprocal
        self.in_features, self.out_features = wide.in_features, wide.out_features
        self._add_buffer("packed", (wide.out_features, wide.in_features // 2), torch.uint8)
        self._add_buffer("block_scale", (wide.out_features, wide.in_features // BLOCK_SIZE), torch.uint8)
        self._add_buffer("tensor_scale", (), torch.float32)
        if input_scale:
            self._add_buffer("input_scale", (), torch.float32)
        else:
            self.register_buffer("input_scale", None, persistent=False)
        if rank:
            self._add_branch("branch", 1, self.out_features, rank, self.in_features)
        self.register_parameter("bias", wide.bias)

    @property
    def backend(self) -> Backend:
        """What runs the weight where it is now."""
        return backend_for(self.packed.device, self.requested_backend)

    def packed_weight(self) -> PackedWeight:
        """The weight as the backend takes it."""
        branch = self._branch("branch")
        return PackedWeight(self.packed, self.block_scale, self.tensor_scale, self.reciprocal, branch)

    @property
    def weight(self) -> Tensor:
        """The weight unpacked, fresh at every access: BF16 ``[out, in]``. For code that reads ``.weight``; slow."""
        return self.backend.whole(self.packed_weight(), torch.bfloat16)

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
    W4A4 ``gate_up_input_scale`` ``[E, 2]`` and ``down_input_scale`` ``[E]``. With branches of rank r beside them
    ``gate_up_branch_up`` BF16 ``[E, 2, I, r]``, ``gate_up_branch_down`` ``[E, 2, r, H]``, ``down_branch_up``
    ``[E, 1, H, r]`` and ``down_branch_down`` ``[E, 1, r, I]``.
    """

    gate_up_packed: Tensor
    gate_up_block_scale: Tensor
    gate_up_tensor_scale: Tensor
    down_packed: Tensor
    down_block_scale: Tensor
    down_tensor_scale: Tensor

    def __init__(self, wide: Any, backend: str, *, reciprocal: bool, input_scale: bool, rank: int = 0) -> None:
        """Take shapes and activation of `wide`, a module with ``gate_up_proj [E, 2 I, H]`` and ``down_proj [E, H, I]``."""
        super().__init__(backend)
        self.reciprocal = reciprocal
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
            if rank:
                linears = 2 if part == "gate_up" else 1
                self._add_branch(f"{part}_branch", linears, rows // linears, rank, columns, (experts,))

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
            self._branch("gate_up_branch", expert),
        )

    def down(self, expert: int) -> PackedWeight:
        """Down of one expert, ``[H, I]``."""
        return PackedWeight(
            self.down_packed[expert],
            self.down_block_scale[expert],
            self.down_tensor_scale[expert],
            self.reciprocal,
            self._branch("down_branch", expert),
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
