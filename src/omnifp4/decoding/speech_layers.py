"""The parts of a layer of the talker, for one token or a few, without a question to the host."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(module: Any, x: Tensor) -> Tensor:
    """RMS norm over the last dimension.

    On CUDA as one kernel, which rounds once, at the end; elsewhere rounded where Transformers rounds as well, before
    the weight is multiplied.
    """
    if x.is_cuda:
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.variance_epsilon)
    weight: Tensor = module.weight
    return weight * scaled.to(x.dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of ``[1, heads, n, d]`` by cosines and sines ``[1, n, d]``."""
    cosine, sine = turn[0].unsqueeze(1), turn[1].unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of the last tokens over a cache.

    Args:
        query: ``[1, heads, n, d]``.
        keys: ``[1, key heads, tokens, d]``.
        values: as `keys`.
        mask: added to the scores, ``[1, 1, 1, tokens]``; None: the last n of the tokens are the query's own, and each
            sees itself and what is before it.
        scale: of the scores.

    Returns:
        ``[1, n, heads * d]``.
    """
    heads, count = query.shape[1], query.shape[2]
    if count == 1:
        # The heads that share a key are rows of one query, so that keys need not be repeated.
        shared = query.view(1, keys.shape[1], -1, query.shape[-1])
        mask = None if mask is None else mask.expand(1, 1, shared.shape[2], -1)
        mixed = F.scaled_dot_product_attention(shared, keys, values, attn_mask=mask, scale=scale)
        return mixed.reshape(1, 1, -1)
    repeats = heads // keys.shape[1]
    mixed = F.scaled_dot_product_attention(
        query, keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1), is_causal=True, scale=scale
    )
    return mixed.transpose(1, 2).reshape(1, count, -1)


def gated(module: Any, x: Tensor) -> Tensor:
    """``down(act(gate(x)) * up(x))``."""
    mixed: Tensor = module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
    return mixed


def experts_mix(module: Any, x: Tensor) -> Tensor:
    """The routed experts of one token and the shared one: ``[1, 1, H]`` to the same."""
    token = x.view(-1, x.shape[-1])
    _, weights, index = module.gate(token)
    shared = torch.sigmoid(module.shared_expert_gate(token)) * gated(module.shared_expert, token)
    return (routed(module.experts, token, index, weights) + shared).view_as(x)


def routed(experts: Any, token: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The mixed outputs of a token's experts.

    Args:
        experts: Transformers' fused ones, with ``gate_up_proj [E, 2 I, H]`` and ``down_proj [E, H, I]``, or packed.
        token: ``[1, H]``.
        index: int64 ``[1, k]``.
        weights: ``[1, k]``.
    """
    if not hasattr(experts, "gate_up_proj"):
        mixed: Tensor = experts(token, index, weights)
        return mixed
    chosen = index[0]
    gate, up = torch.matmul(experts.gate_up_proj.index_select(0, chosen), token[0]).chunk(2, dim=-1)
    inner = experts.act_fn(gate) * up
    outputs = torch.bmm(experts.down_proj.index_select(0, chosen), inner.unsqueeze(-1)).squeeze(-1)
    return (outputs * weights[0].unsqueeze(-1)).float().sum(0, keepdim=True).to(token.dtype)
