"""Linear layers and experts whose weights stay in FP8, MXFP4 or INT8 while they run.

They are unpacked for each product, on any device: the bytes are as on disk, so that saving gives them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnifp4.checkpoint.dialects import CodedLinear
from omnifp4.checkpoint.dtypes import DTYPE_BITS
from omnifp4.formats.mxfp4 import E8M0_VALUES
from omnifp4.formats.nvfp4 import E2M1_VALUES
from omnifp4.formats.scheme import Scheme
from omnifp4.runtime.backends.base import mix_experts
from omnifp4.runtime.packed import PackedModule
from omnifp4.runtime.wide_tensors import TORCH_DTYPES

MOST_GATHERED: Final = 16
"""Most experts that are unpacked at once: two tokens of eight, 0.3 GB for a moment at the real sizes."""


@dataclass(frozen=True, slots=True)
class CodedForm:
    """What all weights of a module have in common.

    Attributes:
        scheme: what the codes are.
        offset: integers are stored with 128 added.
        code_bits: bits on disk of one value.
        scale_dtype: as on disk; E8M0 as uint8.
        whole: one scale for the whole matrix instead of one for each row.
        input_scale: there is a scale for inputs; it is kept and not used.
    """

    scheme: Scheme
    offset: bool
    code_bits: int
    scale_dtype: torch.dtype
    whole: bool
    input_scale: bool

    @classmethod
    def of(cls, source: CodedLinear) -> CodedForm:
        """Of a linear whose tensors have no problems."""
        assert source.scale is not None
        rows, columns = source.shape
        return cls(
            scheme=source.scheme,
            offset=source.codes.dtype == "I32",
            code_bits=DTYPE_BITS[source.codes.dtype] * source.codes.shape[1] // columns,
            scale_dtype=TORCH_DTYPES[source.scale.dtype],
            whole=source.scheme is not Scheme.MXFP4 and source.scale.parameters == 1 and rows > 1,
            input_scale=source.input_scale is not None,
        )

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Of the scales of a matrix ``[rows, columns]``."""
        if self.scheme is Scheme.MXFP4:
            return rows, columns // Scheme.MXFP4.block_size
        return (1,) if self.whole else (rows,)


def decode(codes: Tensor, scale: Tensor, form: CodedForm, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype`: code * scale in float32, rounded once.

    Args:
        codes: bytes as on disk, uint8 ``[..., out, n]``.
        scale: one value, ``[..., out]``, or E8M0 bits uint8 ``[..., out, in / 32]``.
        form: what they mean.
        dtype: of the result ``[..., out, in]``.
    """
    if form.scheme is Scheme.MXFP4:
        pairs, e8m0 = _tables(codes.device)
        values = pairs[codes.int()].view(*scale.shape, Scheme.MXFP4.block_size)
        return values.mul_(e8m0[scale.int()].unsqueeze(-1)).flatten(-2).to(dtype)
    if form.scheme is Scheme.FP8:
        wide = codes.view(torch.float8_e4m3fn).float()
    else:
        wide = ((codes ^ 0x80) if form.offset else codes).view(torch.int8).float()
    return wide.mul_(scale.float().unsqueeze(-1)).to(dtype)


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The two values of every byte of E2M1 codes, float32 ``[256, 2]``, and of every E8M0 byte, ``[256]``."""
    codes = torch.arange(256)
    values = torch.from_numpy(E2M1_VALUES)
    pairs = torch.stack([values[codes & 15], values[codes >> 4]], dim=-1)
    return pairs.to(device), torch.from_numpy(E8M0_VALUES).to(device)


def scheme_linear(wide: nn.Module, source: CodedLinear) -> SchemeLinear:
    """What takes the place of a wide linear layer whose weight is `source` on disk."""
    assert isinstance(wide, nn.Linear)
    return SchemeLinear(wide, CodedForm.of(source))


def scheme_experts(wide: nn.Module, source: CodedLinear) -> SchemeExperts:
    """What takes the place of wide experts of which `source` is one on disk."""
    return SchemeExperts(wide, CodedForm.of(source))


def why_not_coded(module: nn.Module) -> str:
    """Why kernels that read NVFP4 and BF16 cannot run a module: names the first weight below it in another scheme."""
    for name, part in module.named_modules():
        if isinstance(part, SchemeModule):
            return f"its {name or 'weight'} is in {part.form.scheme}, and the kernels read NVFP4 and BF16"
    return ""


class SchemeModule(PackedModule):
    """A module whose weights are in one `CodedForm`."""

    def __init__(self, form: CodedForm) -> None:
        super().__init__("auto")
        self.form = form

    def _add_matrix(self, name: str, leading: tuple[int, ...], rows: int, columns: int, parts: int = 1) -> None:
        """Buffers for matrices of `parts` linears of `rows` rows each."""
        self._add_buffer(f"{name}codes", (*leading, parts * rows, columns * self.form.code_bits // 8), torch.uint8)
        first, *rest = self.form.scale_shape(rows, columns)
        self._add_buffer(f"{name}scale", (*leading, parts * first, *rest), self.form.scale_dtype)


class SchemeLinear(SchemeModule):
    """A linear layer in FP8, MXFP4 or INT8; takes the place of an `nn.Linear`.

    Buffers: ``codes`` uint8 ``[out, bytes of a row]``; ``scale`` in its dtype on disk, ``[out]``, ``[1]`` or
    ``[out, in / 32]``; and, where the checkpoint has one, ``input_scale`` float32 ``[1]``.
    """

    codes: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, wide: nn.Linear, form: CodedForm) -> None:
        """Take the shape and the bias of `wide`, whose weight is dropped."""
        super().__init__(form)
        self.in_features, self.out_features = wide.in_features, wide.out_features
        self._add_matrix("", (), wide.out_features, wide.in_features)
        if form.input_scale:
            self._add_buffer("input_scale", (1,), torch.float32)
        self.register_parameter("bias", wide.bias)

    @property
    def weight(self) -> Tensor:
        """The weight unpacked, fresh at every access: BF16 ``[out, in]``. For code that reads ``.weight``; slow."""
        return decode(self.codes, self.scale, self.form, torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of `x`."""
        return F.linear(x, decode(self.codes, self.scale, self.form, x.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.form.scheme}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class SchemeExperts(SchemeModule):
    """The routed experts of a layer in FP8, MXFP4 or INT8; takes the place of Transformers' fused 3-D experts.

    Buffers, for E experts of width I over a hidden width H: ``gate_up_codes`` uint8 ``[E, 2 I, bytes of a row]``,
    ``gate_up_scale`` ``[E, 2 I]``, ``[E, 2]`` or ``[E, 2 I, H / 32]``, and the same for ``down`` of ``[H, I]``.
    """

    gate_up_codes: Tensor
    gate_up_scale: Tensor
    down_codes: Tensor
    down_scale: Tensor

    def __init__(self, wide: Any, form: CodedForm) -> None:
        """Take shapes and activation of `wide`, a module with ``gate_up_proj [E, 2 I, H]`` and ``down_proj [E, H, I]``."""
        super().__init__(form)
        experts, hidden, inner = (int(size) for size in wide.down_proj.shape)
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, hidden, inner
        self.activate: Callable[[Tensor], Tensor] = wide.act_fn
        self._add_matrix("gate_up_", (experts,), inner, hidden, parts=2)
        self._add_matrix("down_", (experts,), hidden, inner)
        if form.input_scale:
            self._add_buffer("gate_up_input_scale", (experts, 2), torch.float32)
            self._add_buffer("down_input_scale", (experts, 1), torch.float32)

    def gate_up(self, expert: int | Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of gate over up of one expert, or of each of several ``[n]``."""
        scale = self.gate_up_scale[expert]
        if self.form.whole:
            scale = scale.repeat_interleave(self.intermediate_dim, dim=-1)
        return self.gate_up_codes[expert], scale

    def down(self, expert: int | Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of down of one expert, or of each of several ``[n]``."""
        return self.down_codes[expert], self.down_scale[expert]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mix the outputs of the routed experts, see `PackedExperts.forward`."""
        if hidden_states.is_cuda and top_k_index.numel() <= MOST_GATHERED:
            return self.gathered(hidden_states, top_k_index, top_k_weights)

        def linear(x: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
            return F.linear(x, decode(*weight, self.form, x.dtype))

        return mix_experts(self, linear, hidden_states, top_k_index, top_k_weights)

    def gathered(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The same for few slots, all unpacked at once: the host is asked for nothing, so a CUDA graph can hold it."""
        slots = top_k_index.reshape(-1)
        # Transformers numbers slots that are routed nowhere behind the last expert.
        weights = top_k_weights.reshape(-1) * (slots < self.num_experts)
        slots = slots.clamp(max=self.num_experts - 1)
        x = hidden_states.repeat_interleave(top_k_index.shape[1], dim=0).unsqueeze(-1)
        gate, up = (decode(*self.gate_up(slots), self.form, x.dtype) @ x).squeeze(-1).chunk(2, dim=-1)
        inner = (self.activate(gate) * up).unsqueeze(-1)
        outputs = (decode(*self.down(slots), self.form, x.dtype) @ inner).squeeze(-1) * weights.unsqueeze(-1)
        mixed = outputs.view(*top_k_index.shape, -1).sum(dim=1)
        return mixed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.form.scheme}, experts={self.num_experts}, hidden={self.hidden_dim}, inner={self.intermediate_dim}"
        )
