"""The decoder that all text models here share: attention, gated MLP or experts, RMS norms before each.

What differs between model types is data: `DecoderRules` says which biases and norms a type has, the config says the
sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from omnifp4.errors import ModelError
from omnifp4.models.base import Kind
from omnifp4.models.components import Palette
from omnifp4.models.section import MOST_EXPERT_MODULES, Section
from omnifp4.models.tensors import TensorList


@dataclass(frozen=True, slots=True)
class DecoderRules:
    """What the code of a model type fixes, beyond its config.

    Attributes:
        qkv_bias: q, k and v have biases; None: where ``attention_bias`` says so.
        output_bias: the output projection has one; None: where ``attention_bias`` says so.
        mlp_bias: the MLP has biases where ``mlp_bias`` says so, not never.
        qk_norm: q and k are normalized over the head dimension.
        experts: layers may have experts instead of an MLP.
        always_sparse: every layer has experts, whatever ``mlp_only_layers`` and ``decoder_sparse_step`` say.
        shared_expert: a layer with experts also has a gated one that sees every token.
        fused_experts_transposed: released checkpoints store experts as 3-D tensors ``[experts, in, out]``.
    """

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = True
    experts: bool = False
    always_sparse: bool = False
    shared_expert: bool = False
    fused_experts_transposed: bool = False


@dataclass(frozen=True, slots=True)
class Decoder:
    """The sizes of one decoder, read and checked. Widths are in values (features)."""

    rules: DecoderRules
    width: int
    layers: int
    query_width: int
    key_width: int
    head_width: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    inner_width: int
    experts: int = 0
    expert_width: int = 0
    shared_width: int = 0
    sparse_layers: frozenset[int] = frozenset()


def read_decoder(section: Section, rules: DecoderRules) -> Decoder:
    """Reads the sizes of a decoder from its section of the config.

    Raises:
        ModelError: a key is missing, ill-typed or absurd, or contradicts another.
    """
    section.require("hidden_act", "silu")
    width = section.size("hidden_size")
    layers = section.layers("num_hidden_layers")
    head_width, query_width, key_width = read_heads(section, width)
    bias = section.flag("attention_bias") if rules.qkv_bias is None or rules.output_bias is None else False
    sparse, experts = _read_sparse_layers(section, rules, layers)
    return Decoder(
        rules,
        width,
        layers,
        query_width=query_width,
        key_width=key_width,
        head_width=head_width,
        qkv_bias=bias if rules.qkv_bias is None else rules.qkv_bias,
        output_bias=bias if rules.output_bias is None else rules.output_bias,
        mlp_bias=rules.mlp_bias and section.flag("mlp_bias"),
        inner_width=section.size("intermediate_size") if len(sparse) < layers else 0,
        experts=experts if sparse else 0,
        expert_width=section.size("moe_intermediate_size") if sparse else 0,
        shared_width=section.size("shared_expert_intermediate_size") if rules.shared_expert and sparse else 0,
        sparse_layers=sparse,
    )


def read_heads(section: Section, width: int) -> tuple[int, int, int]:
    """The width of a head, of all query heads, and of all key (or value) heads."""
    heads = section.size("num_attention_heads")
    key_heads = section.optional_size("num_key_value_heads") or heads
    if heads % key_heads:
        raise section.refuse("num_key_value_heads", key_heads, f"a divisor of num_attention_heads, {heads}")
    head_width = section.optional_size("head_dim")
    if head_width is None:
        head_width = width // heads
        if not head_width:
            raise section.refuse("num_attention_heads", heads, f"at most hidden_size, {width}")
    return head_width, head_width * heads, head_width * key_heads


def _read_sparse_layers(section: Section, rules: DecoderRules, layers: int) -> tuple[frozenset[int], int]:
    """The layers that have experts, and how many each has."""
    experts = section.size("num_experts", least=0) if rules.experts else 0
    if not experts:
        if rules.always_sparse:
            raise section.refuse("num_experts", experts, "positive: every layer of this model has experts")
        return frozenset(), 0
    if layers * experts > MOST_EXPERT_MODULES:
        raise ModelError(
            f"config: {section.key('num_hidden_layers')} x {section.key('num_experts')} is {layers} x {experts}:"
            f" at most {MOST_EXPERT_MODULES} experts in all are supported"
        )
    if "num_experts_per_tok" in section.values:
        # No tensor has its shape, but a model that asks no expert would calibrate, run, and say nothing right.
        section.size("num_experts_per_tok", most=experts)
    if rules.always_sparse:
        return frozenset(range(layers)), experts
    step = section.size("decoder_sparse_step")
    dense = frozenset(section.integers("mlp_only_layers", least=0))
    return frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0), experts


def add_decoder(out: TensorList, prefix: str, decoder: Decoder, palette: Palette) -> None:
    """Adds the layers and the last norm of a decoder; `prefix` ends with a dot, or is empty."""
    for layer in range(decoder.layers):
        add_decoder_layer(out, f"{prefix}layers.{layer}", decoder, palette, sparse=layer in decoder.sparse_layers)
    out.norm(f"{prefix}norm", decoder.width, palette[Kind.NORMS])


def add_decoder_layer(out: TensorList, name: str, decoder: Decoder, palette: Palette, *, sparse: bool) -> None:
    """Adds one layer; `sparse` gives it experts instead of an MLP."""
    norms, attention, width = palette[Kind.NORMS], f"{name}.self_attn", decoder.width
    out.norm(f"{name}.input_layernorm", width, norms)
    for part, size in (("q", decoder.query_width), ("k", decoder.key_width), ("v", decoder.key_width)):
        out.linear(
            f"{attention}.{part}_proj",
            width,
            size,
            palette[Kind.ATTENTION],
            bias=decoder.qkv_bias,
            scale_group=f"{attention}.qkv",
        )
    if decoder.rules.qk_norm:
        out.norm(f"{attention}.q_norm", decoder.head_width, norms)
        out.norm(f"{attention}.k_norm", decoder.head_width, norms)
    out.linear(f"{attention}.o_proj", decoder.query_width, width, palette[Kind.ATTENTION], bias=decoder.output_bias)
    out.norm(f"{name}.post_attention_layernorm", width, norms)
    if not sparse:
        out.gated_mlp(f"{name}.mlp", width, decoder.inner_width, palette[Kind.MLP], bias=decoder.mlp_bias)
        return
    out.linear(f"{name}.mlp.gate", width, decoder.experts, palette[Kind.ROUTER])
    out.experts(
        f"{name}.mlp.experts",
        decoder.experts,
        width,
        decoder.expert_width,
        palette[Kind.EXPERTS],
        transposed_first=decoder.rules.fused_experts_transposed,
    )
    if decoder.shared_width:
        out.linear(f"{name}.mlp.shared_expert_gate", width, 1, palette[Kind.ROUTER])
        out.gated_mlp(f"{name}.mlp.shared_expert", width, decoder.shared_width, palette[Kind.SHARED_EXPERTS])


def add_head(
    out: TensorList, module: str, width: int, vocabulary: int, palette: Palette, *, tied: bool, names: frozenset[str]
) -> None:
    """Adds the layer that turns the last state into scores.

    Where it is tied to the embeddings, a checkpoint may hold a copy or none: `names`, if any, decide.
    """
    if tied and names and f"{module}.weight" not in names:
        return
    out.linear(module, width, vocabulary, palette[Kind.HEAD], optional=tied)
