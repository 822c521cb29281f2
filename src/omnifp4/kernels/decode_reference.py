"""What the decode kernels must compute, in plain float32 torch on any device: the contract, and the judge in tests.

Where Transformers rounds to BF16, the kernels do, and so does this; sums are exact to float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnifp4.formats.nvfp4 import E2M1_VALUES, E4M3_VALUES
from omnifp4.kernels.cuda.decoder import CODE_FACTOR, Matrix
from omnifp4.kernels.cuda.shapes import PAGE, DecoderShape

FP4_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def in_fp4_order(x: Tensor) -> Tensor:
    """Activations as FP4 matrices read them; the last dimension is a multiple of 128.

    Of 128 neighbours, groups of eight stand in column order of a 4 x 4 square, and each group in the order of the codes
    of a 32-bit word.
    """
    return x.reshape(*x.shape[:-1], -1, 4, 4, 8).transpose(-3, -2)[..., list(FP4_ORDER)].reshape(x.shape)


def in_natural_order(x: Tensor) -> Tensor:
    """The inverse of `in_fp4_order`."""
    back = [FP4_ORDER.index(i) for i in range(8)]
    return x.reshape(*x.shape[:-1], -1, 4, 4, 8)[..., back].transpose(-3, -2).reshape(x.shape)


def weights_of(matrix: Matrix, expert: int | None = None) -> Tensor:
    """The weights as float32 ``[rows, columns]``; of one expert where the matrix holds several."""
    weights = matrix.weights if expert is None else matrix.weights[expert]
    if matrix.scales is None or matrix.factors is None:
        return weights.float()
    scales = matrix.scales if expert is None else matrix.scales[expert]
    values = torch.from_numpy(E2M1_VALUES).float().to(weights.device)
    e4m3 = torch.from_numpy(E4M3_VALUES).float().to(weights.device)
    codes = torch.stack([weights & 15, weights >> 4], dim=-1).flatten(-2)
    wide = values[codes.int()] * e4m3[scales.int()].repeat_interleave(16, dim=-1)
    if expert is None:
        return wide * (matrix.factors / CODE_FACTOR).repeat_interleave(16)[: len(wide), None]
    return wide * (matrix.factors[expert] / CODE_FACTOR)


def rounded(x: Tensor) -> Tensor:
    """To BF16 and back."""
    return x.to(torch.bfloat16).float()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm with Transformers' roundings, float32 in and out."""
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return rounded(rounded(x * inverse) * weight.float())


@dataclass(frozen=True)
class Routed:
    """Logits ``[rows, experts]``, chosen experts and their weights ``[rows, top_k]``."""

    logits: Tensor
    experts: Tensor
    weights: Tensor


def route(logits: Tensor, top_k: int, normalise: bool) -> Routed:
    """Softmax and top-k; of equal logits the lower expert wins."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True)
    experts = order.indices[:, :top_k]
    chosen = torch.softmax(logits, -1).gather(1, experts)
    if normalise:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    return Routed(logits, experts, rounded(chosen))


def gate_up(x: Tensor, experts: Tensor, matrix: Matrix, inner: int) -> Tensor:
    """SiLU(gate) * up per slot: ``[rows, hidden]`` and ``[rows, top_k]`` to ``[rows, top_k, inner]``."""
    out = torch.zeros((*experts.shape, inner), device=x.device)
    for row, chosen in enumerate(experts.tolist()):
        for place, expert in enumerate(chosen):
            if expert < 0:
                continue
            gate, up = rounded(weights_of(matrix, expert) @ x[row]).tensor_split(2)
            out[row, place] = rounded(rounded(gate / (1 + torch.exp(-gate))) * up)
    return out


def down(x: Tensor, experts: Tensor, matrix: Matrix, hidden: int) -> Tensor:
    """Down projection per slot: ``[rows, top_k, inner]`` to ``[rows, top_k, hidden]``."""
    out = torch.zeros((*experts.shape, hidden), device=x.device)
    for row, chosen in enumerate(experts.tolist()):
        for place, expert in enumerate(chosen):
            if expert >= 0:
                out[row, place] = rounded(weights_of(matrix, expert) @ x[row, place])
    return out


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of ``[heads, head_dim]`` at one position, with Transformers' roundings."""
    a, b = x.chunk(2, dim=-1)
    c, s = cosine.float(), sine.float()
    return torch.cat([rounded(rounded(a * c) - rounded(b * s)), rounded(rounded(b * c) + rounded(a * s))], dim=-1)


def attention(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor],
    eps: float,
    rotary: tuple[Tensor, Tensor],
    length: int,
    shift: int,
    pages: Tensor,
    cache: tuple[Tensor, Tensor],
    shape: DecoderShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """One row: its output ``[heads * head_dim]`` and the key and value ``[kv_heads, head_dim]`` of its new token."""
    q, k, v = qkv.float().tensor_split([shape.heads * shape.head_dim, (shape.heads + shape.kv_heads) * shape.head_dim])
    q, k, v = (t.view(-1, shape.head_dim) for t in (q, k, v))
    if shape.qk_norm:
        q, k = norm(q, norms[0], eps), norm(k, norms[1], eps)
    at = length + shift
    q, k = rotate(q, rotary[0][at], rotary[1][at]), rotate(k, rotary[0][at], rotary[1][at])
    held = [c[pages.long()].transpose(1, 2).reshape(-1, shape.kv_heads, shape.head_dim)[:length] for c in cache]
    keys = torch.cat([held[0].float(), k[None]]).repeat_interleave(shape.group, dim=1)
    values = torch.cat([held[1].float(), v[None]]).repeat_interleave(shape.group, dim=1)
    scores = torch.einsum("hd,thd->ht", q, keys) * shape.head_dim**-0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), values).flatten(), k, v


__all__ = [
    "PAGE", "Routed", "attention", "down", "gate_up", "in_fp4_order", "in_natural_order", "norm", "rotate", "rounded",
    "route", "weights_of",
]  # fmt: skip
