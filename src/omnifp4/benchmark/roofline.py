"""Bytes that a decode step must move, counted from the loaded model, and the speed that memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from omnifp4.benchmark.parts import SPEECH_PARTS, TEXT_PARTS, part_of, tensors_of
from omnifp4.receipt.bench import Traffic
from omnifp4.runtime.packed import PackedExperts


def expert_modules(model: Any) -> Iterator[nn.Module]:
    """The routed experts of each decoder layer of the thinker, packed or wide."""
    for module in model.thinker.get_decoder().modules():
        wide = getattr(module, "down_proj", None)
        if isinstance(module, PackedExperts) or (isinstance(wide, nn.Parameter) and wide.ndim == 3):
            yield module


def count_traffic(model: Any) -> Traffic:
    """See `Traffic`. Rotary tables and other computed buffers are a few kilobytes and are not counted."""
    text = model.config.thinker_config.text_config
    persistent = set(model.state_dict())
    always = row = 0
    for name, tensor in tensors_of(model):
        part, size = part_of(name), tensor.numel() * tensor.element_size()
        if part == "embeddings" and "visual" not in name:
            row = size // tensor.shape[0]
        elif part in TEXT_PARTS and part not in ("experts", *SPEECH_PARTS) and name in persistent:
            always += size
    experts = [sum(t.numel() * t.element_size() for _, t in tensors_of(one)) for one in expert_modules(model)]
    width = text.num_key_value_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    element = next(model.thinker.lm_head.parameters()).element_size()
    return Traffic(
        always=always,
        expert=experts[0] // text.num_experts if experts else 0,
        layers=len(experts),
        row=row,
        cache_token=2 * text.num_hidden_layers * width * element,
    )


def uniform_experts(experts: int, chosen: int, batch: int) -> float:
    """Distinct experts that `batch` tokens are expected to choose, `chosen` each, uniformly."""
    return float(experts * (1 - (1 - chosen / experts) ** batch))


def step_bytes(traffic: Traffic, *, batch: int, experts: float, context: float) -> int:
    """Bytes of one step.

    Args:
        traffic: of the model.
        batch: sequences.
        experts: distinct ones a layer.
        context: tokens that each sequence has in the cache before the step.
    """
    weights = traffic.always + traffic.layers * experts * traffic.expert + batch * traffic.row
    return round(weights + batch * (context + 1) * traffic.cache_token)


def bound(traffic_bytes: int, batch: int, bytes_per_second: float) -> float:
    """Tokens a second of all sequences, if nothing but memory took time."""
    return batch * bytes_per_second / traffic_bytes
