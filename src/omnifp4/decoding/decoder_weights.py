"""A text decoder's weights as the kernels of a decode step read them; nothing is copied that stays.

The q, k and v projections of a layer become one matrix. Their modules keep views of it, so they still work and are
saved as before, and the memory is that of one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnifp4.decoding.engine import DecodingError
from omnifp4.kernels.cuda.decoder import CODE_FACTOR, Matrix
from omnifp4.kernels.cuda.decoder_plan import DecoderPlan, Processor
from omnifp4.kernels.cuda.shapes import DecoderShape
from omnifp4.runtime.coded import why_not_coded
from omnifp4.runtime.packed import NVFP4Linear, PackedExperts, PackedModule

LARGEST_SCALE_BITS = 0x7E
"""E4M3 bits above are NaN or negative, which no block scale may be."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer; norms BF16 ``[hidden]`` and ``[head_dim]``, router BF16 ``[experts, hidden]``."""

    input_norm: Tensor
    post_attention_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor
    qkv: Matrix
    o: Matrix
    router: Tensor
    gate_up: Matrix
    down: Matrix
    experts: nn.Module


@dataclass(frozen=True)
class DecoderWeights:
    """A text decoder.

    Attributes:
        shape: its sizes.
        eps: of every norm.
        layers: in order.
        embeddings: BF16 ``[vocabulary, hidden]``.
        norm: the last norm's weight.
        head: BF16 ``[vocabulary, hidden]``.
        rotary: the module that turns positions into cosines and sines.
    """

    shape: DecoderShape
    eps: float
    layers: tuple[Layer, ...]
    embeddings: Tensor
    norm: Tensor
    head: Tensor
    rotary: nn.Module

    @property
    def fp4(self) -> dict[str, bool]:
        """Which matrices are FP4; the same in every layer."""
        first = self.layers[0]
        return {"qkv": first.qkv.is_fp4, "o": first.o.is_fp4, "experts": first.gate_up.is_fp4}


def thinker_of(model: Any) -> Any:
    """The part of an omni model that makes text, or the model itself."""
    return getattr(model, "thinker", model)


def shape_of(model: Any) -> DecoderShape:
    """The sizes that the model's text config gives.

    Raises:
        DecodingError: it is no mixture of experts.
    """
    text = thinker_of(model).get_decoder().config
    if not getattr(text, "num_experts", 0):
        raise DecodingError("the text decoder has no routed experts")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DecoderShape(
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        experts=text.num_experts,
        top_k=text.num_experts_per_tok,
        inner=text.moe_intermediate_size,
        normalise_top_k=bool(text.norm_topk_prob),
    )


def why_not(model: Any) -> str:
    """Why the kernels cannot run this model's text decoder; empty if they can. Reads no weights."""
    thinker = thinker_of(model)
    text = thinker.get_decoder() if hasattr(thinker, "get_decoder") else None
    if text is None or not hasattr(text, "layers") or not hasattr(thinker, "lm_head"):
        return "it has no text decoder of a kind that is known"
    if reason := why_not_coded(text) or why_not_coded(thinker.lm_head):
        return reason
    try:
        if reason := shape_of(model).why_not():
            return reason
    except DecodingError as error:
        return str(error)
    config = text.config
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act!r}, and the kernels compute SiLU"
    if thinker.lm_head.weight.dtype != torch.bfloat16 or thinker.lm_head.bias is not None:
        return f"its head is {thinker.lm_head.weight.dtype}, and the kernels compute in BF16 without a bias"
    if config.vocab_size % 8:
        return f"its vocabulary of {config.vocab_size} is no multiple of 8"
    for number, layer in enumerate(text.layers):
        attention = layer.self_attn
        if not hasattr(layer.mlp, "experts") or hasattr(layer.mlp, "shared_expert"):
            return f"layer {number} is no plain mixture of experts"
        if getattr(attention, "sliding_window", None) or not hasattr(attention, "q_norm"):
            return f"layer {number}'s attention has a sliding window or no norm of queries and keys"
        parts = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        if any(getattr(part, "has_branch", False) for part in (*parts, layer.mlp.experts)):
            return f"layer {number} has low-rank branches beside its FP4 weights, and the kernels compute none"
        if any(part.bias is not None for part in parts):
            return f"layer {number}'s attention has biases"
        if len({isinstance(part, NVFP4Linear) for part in parts[:3]}) > 1:
            return f"layer {number} has only some of q, k and v in FP4"
        if any(part.out_features % 16 for part in parts):
            return f"layer {number}'s attention has rows that are no multiple of 16"
    first = text.layers[0]
    forms = [
        (isinstance(x.self_attn.q_proj, NVFP4Linear), isinstance(x.self_attn.o_proj, NVFP4Linear), type(x.mlp.experts))
        for x in text.layers
    ]
    if len(set(forms)) > 1:
        return "its layers differ in what is FP4"
    if not isinstance(first.mlp.experts, PackedExperts) and not hasattr(first.mlp.experts, "gate_up_proj"):
        return f"its experts are {type(first.mlp.experts).__name__}, which the kernels cannot read"
    return ""


def why_not_cut(model: Any, processor: Processor, most_rows: int) -> str:
    """Why a kind of GPU cannot hold what the kernels need at once; empty if it can. For a model that `why_not` allows."""
    first = thinker_of(model).get_decoder().layers[0]
    fp4 = {
        "qkv": isinstance(first.self_attn.q_proj, NVFP4Linear),
        "o": isinstance(first.self_attn.o_proj, NVFP4Linear),
        "experts": isinstance(first.mlp.experts, PackedExperts),
    }
    try:
        for rows in {1, most_rows}:
            DecoderPlan(shape_of(model), rows, fp4, processor)
    except ValueError as error:
        return str(error)
    return ""


def read_weights(model: Any) -> DecoderWeights:
    """The model's weights for the kernels; q, k and v are joined in place.

    Raises:
        DecodingError: a scale is not a number or negative.
    """
    thinker = thinker_of(model)
    text = thinker.get_decoder()
    with torch.no_grad():
        layers = tuple(_layer(layer) for layer in text.layers)
        scales = [m.scales for layer in layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        found = [one.max() for one in scales if one is not None]
        if found and int(torch.stack(found).max()) > LARGEST_SCALE_BITS:
            raise DecodingError("a block scale is negative or not a number", hint="omnifp4 verify MODEL")
    return DecoderWeights(
        shape=shape_of(model),
        eps=float(text.config.rms_norm_eps),
        layers=layers,
        embeddings=thinker.get_input_embeddings().weight.detach(),
        norm=text.norm.weight.detach(),
        head=thinker.lm_head.weight.detach(),
        rotary=text.rotary_emb,
    )


def _layer(layer: Any) -> Layer:
    attention, experts = layer.self_attn, layer.mlp.experts
    if isinstance(experts, PackedExperts):
        factor = _factors(experts.gate_up_tensor_scale, experts)
        gate_up = Matrix(experts.gate_up_packed, experts.gate_up_block_scale, factor)
        factor = _factors(experts.down_tensor_scale, experts)
        down = Matrix(experts.down_packed, experts.down_block_scale, factor)
    else:
        gate_up, down = Matrix(experts.gate_up_proj.detach()), Matrix(experts.down_proj.detach())
    return Layer(
        input_norm=layer.input_layernorm.weight.detach(),
        post_attention_norm=layer.post_attention_layernorm.weight.detach(),
        q_norm=attention.q_norm.weight.detach(),
        k_norm=attention.k_norm.weight.detach(),
        qkv=join([attention.q_proj, attention.k_proj, attention.v_proj]),
        o=join([attention.o_proj]),
        router=layer.mlp.gate.weight.detach(),
        gate_up=gate_up,
        down=down,
        experts=experts,
    )


def join(parts: Sequence[Any]) -> Matrix:
    """One matrix of the rows of several linear layers; the layers keep views of it.

    Args:
        parts: `NVFP4Linear` or `nn.Linear`, all of one kind, of one input width; rows are multiples of 16.
    """
    if not isinstance(parts[0], NVFP4Linear):
        weights = _shared([part.weight for part in parts])
        for part, view in zip(parts, weights.split([part.out_features for part in parts]), strict=True):  # type: ignore[no-untyped-call]
            part.weight.data = view
        return Matrix(weights)
    rows = [part.out_features for part in parts]
    buffers = {}
    for name in ("packed", "block_scale"):
        joined = _shared([getattr(part, name) for part in parts])
        for part, view in zip(parts, joined.split(rows), strict=True):  # type: ignore[no-untyped-call]
            part._buffers[name] = view
        buffers[name] = joined
    factors = torch.cat([_factors(p.tensor_scale, p).expand(p.out_features // 16) for p in parts])
    return Matrix(buffers["packed"], buffers["block_scale"], factors.contiguous())


def _shared(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one below the other; themselves where they lie so already."""
    first = tensors[0].detach()
    if len(tensors) == 1:
        return first.contiguous()
    # An engine joined them before: views of one storage, each where the last one ends. Neighbours by chance, in storages
    # of their own, are not joined: no view reaches over both.
    end, width, storage = first.data_ptr(), first.shape[1] * first.element_size(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        joined = tensor.data_ptr() == end and tensor.untyped_storage().data_ptr() == storage
        if not joined or not tensor.is_contiguous():
            return torch.cat([one.detach() for one in tensors])
        end += tensor.shape[0] * width
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _factors(tensor_scale: Tensor, module: PackedModule) -> Tensor:
    scale = tensor_scale.detach().float().reshape(-1)
    return CODE_FACTOR * (1 / scale if module.reciprocal else scale)
