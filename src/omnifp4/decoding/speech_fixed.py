"""Talker and code predictor on caches of fixed size at fixed addresses: what a CUDA graph can hold.

The projections are the modules of the model, whatever they are: wide, or packed by this package. The rest of a layer is
written here. Greedy codes equal those of `ModuleSteps` but for ties that rounding decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnifp4.decoding.speech_layers import attend, experts_mix, gated, norm, rotate
from omnifp4.decoding.speech_steps import Steps


class FixedSteps(Steps):
    """See `Steps`."""

    def __init__(self, talker: Any, capacity: int) -> None:
        """`capacity`: the most tokens, prompt and frames, of one speech."""
        text, predictor = talker.config.text_config, talker.config.code_predictor_config
        embedding = talker.get_input_embeddings().weight
        self.capacity = capacity
        self._cache = _caches(text, capacity, embedding)
        self._predicted = _caches(predictor, talker.config.num_code_groups, embedding)
        device = embedding.device
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._shift = torch.zeros(1, dtype=torch.long, device=device)
        self._places = torch.arange(capacity, device=device)
        positions = torch.arange(talker.config.num_code_groups, device=device)[None]
        with torch.no_grad():
            self._turns = talker.code_predictor.model.rotary_emb(embedding[None, :1], positions)

    def begin(self, talker: Any, prompt_cache: Any, shift: Tensor, tokens: int) -> None:
        """See `Steps.begin`."""
        for (keys, values), layer in zip(self._cache, prompt_cache.layers, strict=True):
            # What no token has written yet is masked, but must be a number.
            keys[:, :, tokens:].zero_()
            values[:, :, tokens:].zero_()
            keys[:, :, :tokens] = layer.keys
            values[:, :, :tokens] = layer.values
        self._place.fill_(tokens)
        self._shift.copy_(shift)

    def talk(self, talker: Any, embedding: Tensor) -> Tensor:
        """See `Steps.talk`."""
        model = talker.model
        positions = (self._place + self._shift).view(1, 1, 1).expand(3, 1, 1)
        turn = model.rotary_emb(embedding, positions)
        mask = torch.zeros(self.capacity, dtype=embedding.dtype, device=embedding.device)
        mask = mask.masked_fill(self._places > self._place, -torch.inf).view(1, 1, 1, -1)
        hidden = embedding
        for layer, (keys, values) in zip(model.layers, self._cache, strict=True):
            query, key, value = _project(layer, hidden, turn)
            keys.index_copy_(2, self._place, key)
            values.index_copy_(2, self._place, value)
            hidden = hidden + layer.self_attn.o_proj(attend(query, keys, values, mask, layer.self_attn.scaling))
            hidden = hidden + experts_mix(layer.mlp, norm(layer.post_attention_layernorm, hidden))
        self._place += 1
        return norm(model.norm, hidden)

    def predict(self, talker: Any, embedding: Tensor, place: int) -> Tensor:
        """See `Steps.predict`."""
        model = talker.code_predictor.model
        end = place + embedding.shape[1]
        turn = (self._turns[0][:, place:end], self._turns[1][:, place:end])
        hidden = embedding
        for layer, (keys, values) in zip(model.layers, self._predicted, strict=True):
            query, key, value = _project(layer, hidden, turn)
            keys[:, :, place:end] = key
            values[:, :, place:end] = value
            mixed = attend(query, keys[:, :, :end], values[:, :, :end], None, layer.self_attn.scaling)
            hidden = hidden + layer.self_attn.o_proj(mixed)
            hidden = hidden + gated(layer.mlp, norm(layer.post_attention_layernorm, hidden))
        return norm(model.norm, hidden)


def _project(layer: Any, hidden: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``[1, heads, n, d]``, key and value ``[1, key heads, n, d]`` of a layer's input ``[1, n, H]``."""
    attention = layer.self_attn
    shape = (1, hidden.shape[1], -1, attention.head_dim)
    normed = norm(layer.input_layernorm, hidden)
    query = norm(attention.q_norm, attention.q_proj(normed).view(shape)).transpose(1, 2)
    key = norm(attention.k_norm, attention.k_proj(normed).view(shape)).transpose(1, 2)
    value = attention.v_proj(normed).view(shape).transpose(1, 2)
    return rotate(query, turn), rotate(key, turn), value


def _caches(config: Any, capacity: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    heads, width = config.num_key_value_heads, config.head_dim
    return [
        (like.new_zeros((1, heads, capacity, width)), like.new_zeros((1, heads, capacity, width)))
        for _ in range(config.num_hidden_layers)
    ]
