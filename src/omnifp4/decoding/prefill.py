"""A prompt through the text decoder: keys and values into the cache, and the last position's logits.

What stands before the decoder (embeddings, towers, the places of their features) is Transformers' own code: its call
of the decoder is taken down, not re-made. The decoder's layers are run here, because the stock ones dispatch several
hundred small operations a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnifp4.decoding.decoder_weights import DecoderWeights, Layer, thinker_of
from omnifp4.decoding.model_lock import model_lock
from omnifp4.decoding.paged_cache import PagedCache
from omnifp4.kernels.cuda.decoder import CODE_FACTOR, Matrix
from omnifp4.kernels.cuda.prompt import PromptKernels
from omnifp4.runtime.packed import PackedExperts
from omnifp4.runtime.positions import rotary_positions

if TYPE_CHECKING:
    from omnifp4.chat.inputs import ModelInputs

TEXT_ONLY = frozenset({"input_ids", "attention_mask"})


@dataclass(frozen=True)
class DecoderInputs:
    """What the text decoder reads of one prompt.

    Attributes:
        hidden: embeddings with the towers' features in place, BF16 ``[tokens, hidden]``.
        positions: int64 ``[3, 1, tokens]``.
        shift: rotary position of the next token minus the number of tokens.
        visual: bool ``[tokens]``, where pictures stand; None without any.
        deepstack: features to add there after the first layers, BF16 ``[pictures' tokens, hidden]`` each.
    """

    hidden: Tensor
    positions: Tensor
    shift: int
    visual: Tensor | None
    deepstack: tuple[Tensor, ...]


class _Taken(Exception):
    """Ends the stock forward where the decoder would begin."""


def decoder_inputs(model: Any, inputs: ModelInputs) -> DecoderInputs:
    """Embeddings and positions of a prompt, media included."""
    thinker = thinker_of(model)
    tensors = dict(inputs.tensors)
    ids = tensors["input_ids"]
    if set(tensors) <= TEXT_ONLY:
        positions = torch.arange(ids.shape[1], device=ids.device).view(1, 1, -1).expand(3, 1, -1)
        return DecoderInputs(thinker.get_input_embeddings()(ids)[0], positions, 0, None, ())
    positions, shift = rotary_positions(thinker, tensors, sound_in_video=inputs.sound_in_video)
    positions = positions.to(ids.device)
    text = thinker.get_decoder()
    taken: dict[str, Any] = {}

    def take(**arguments: Any) -> Any:
        taken.update(arguments)
        raise _Taken

    with model_lock(thinker):
        # Set on this one module: its class and other models stay as they are.
        text.forward = take
        try:
            thinker(**tensors, position_ids=positions, use_audio_in_video=inputs.sound_in_video, use_cache=False)
        except _Taken:
            pass
        finally:
            del text.forward
    mask, deepstack = taken.get("visual_pos_masks"), taken.get("deepstack_visual_embeds")
    hidden = taken["inputs_embeds"][0]
    features = tuple(one.to(hidden.device, hidden.dtype) for one in deepstack or ())
    visual = mask[0].to(hidden.device) if mask is not None and features else None
    return DecoderInputs(hidden, positions, int(shift.reshape(-1)[0]), visual, features)


class Prefill:
    """The decoder's layers for one prompt at a time."""

    def __init__(self, weights: DecoderWeights, cache: PagedCache) -> None:
        """Compiles what is needed."""
        self._weights = weights
        self._cache = cache
        self._kernels = PromptKernels(weights.shape, weights.head.device)

    @torch.no_grad()
    def run(self, inputs: DecoderInputs, slot: int, states_after: int | None) -> tuple[Tensor, Tensor | None]:
        """Read a prompt into the cache.

        Args:
            inputs: from `decoder_inputs`.
            slot: whose pages take keys and values.
            states_after: the number of layers after which the hidden states are kept; None keeps none.

        Returns:
            The last position's logits BF16 ``[1, vocabulary]``, and the kept states ``[1, tokens, hidden]`` or None.
        """
        weights, kernels, shape = self._weights, self._kernels, self._weights.shape
        hidden = inputs.hidden.contiguous().clone()
        tokens = len(hidden)
        cosine, sine = weights.rotary(hidden[None], inputs.positions)
        half = shape.head_dim // 2
        rotary = cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()
        x = torch.empty_like(hidden)
        states = hidden[None].clone() if states_after == 0 else None
        for number, layer in enumerate(weights.layers):
            kernels.norm(hidden, layer.input_norm, weights.eps, x)
            qkv = self._linear(x, layer.qkv)
            kernels.place_heads(
                qkv, (layer.q_norm, layer.k_norm), weights.eps, rotary, self._cache.tables[slot],
                (self._cache.keys[number], self._cache.values[number]),
            )  # fmt: skip
            q, k, v = (
                part.view(1, tokens, -1, shape.head_dim).transpose(1, 2)
                for part in qkv.split(  # type: ignore[no-untyped-call]
                    [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2], dim=1
                )
            )
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            hidden += self._linear(heads.transpose(1, 2).reshape(tokens, -1), layer.o)
            kernels.norm(hidden, layer.post_attention_norm, weights.eps, x)
            hidden += self._experts(x, layer)
            if states_after == number + 1:
                states = hidden[None].clone()
            if inputs.visual is not None and number < len(inputs.deepstack):
                hidden[inputs.visual] += inputs.deepstack[number]
        last = hidden[-1:]
        normed = torch.empty_like(last)
        kernels.norm(last, weights.norm, weights.eps, normed)
        return normed @ weights.head.t(), states

    def _linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        if matrix.scales is None or matrix.factors is None:
            return F.linear(x, matrix.weights)
        from omnifp4.kernels.prefill.unpacking import dequantize

        # A factor per 16 rows: as many small matrices.
        units = len(matrix.factors)
        wide = dequantize(
            matrix.weights.view(units, 16, -1), matrix.scales.view(units, 16, -1), matrix.factors / CODE_FACTOR, False, x.dtype
        )  # fmt: skip
        return F.linear(x, wide.view(matrix.rows, matrix.columns))

    def _experts(self, x: Tensor, layer: Layer) -> Tensor:
        shape = self._weights.shape
        probabilities = torch.softmax(F.linear(x, layer.router), dim=-1, dtype=torch.float)
        chosen, index = torch.topk(probabilities, shape.top_k, dim=-1)
        if shape.normalise_top_k:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        chosen = chosen.to(x.dtype)
        experts: Any = layer.experts
        if not isinstance(experts, PackedExperts):
            mixed: Tensor = experts(x, index, chosen)
            return mixed
        from omnifp4.kernels.prefill.experts import experts as packed_experts
        from omnifp4.kernels.prefill.matrices import PackedMatrices

        gate_up = PackedMatrices(
            experts.gate_up_packed, experts.gate_up_block_scale, experts.gate_up_tensor_scale, experts.reciprocal
        )
        down = PackedMatrices(
            experts.down_packed, experts.down_block_scale, experts.down_tensor_scale, experts.reciprocal
        )
        return packed_experts(x, index, chosen, gate_up, down)
