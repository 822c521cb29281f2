"""A prompt through the text decoder: keys and values into the cache, and the last position's logits.

What stands before the decoder (embeddings, towers, the places of their features) is Transformers' own code: its call
of the decoder is taken down, not re-made. The decoder's layers are run here, because the stock ones dispatch several
hundred small operations a layer. Even so the host takes longer to launch a short prompt than the GPU to read it: short
ones are filled up with tokens that go nowhere and run as a CUDA graph, captured for the first of about their length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from omnifp4.decoding.decoder_weights import DecoderWeights, Layer, thinker_of
from omnifp4.decoding.model_lock import model_lock
from omnifp4.decoding.paged_cache import PagedCache
from omnifp4.kernels.cuda.decoder import CODE_FACTOR, Matrix
from omnifp4.kernels.cuda.prompt import PromptKernels
from omnifp4.kernels.cuda.shapes import PAGE
from omnifp4.runtime.packed import PackedExperts
from omnifp4.runtime.positions import rotary_positions

if TYPE_CHECKING:
    from omnifp4.chat.inputs import ModelInputs

TEXT_ONLY: Final = frozenset({"input_ids", "attention_mask"})
GRAPH_TOKENS: Final = (16, 32, 64, 128, 256, 512)
"""Prompts are filled up to these lengths; above, the GPU has more to do than the host."""


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


@dataclass(frozen=True)
class _Places:
    """Where a prompt's tokens stand: cosines and sines BF16 ``[tokens, head_dim / 2]``, and the slot's pages in order.

    `filled` tells the tokens of a prompt, bool ``[tokens, 1]``, where others fill it up; they have no experts.
    """

    cosine: Tensor
    sine: Tensor
    table: Tensor
    filled: Tensor | None = None


@dataclass(frozen=True)
class _Captured:
    """A graph for prompts of up to so many tokens, with what it reads and writes."""

    graph: Any
    hidden: Tensor
    places: _Places
    last: Tensor
    logits: Tensor
    states: Tensor | None


class Prefill:
    """The decoder's layers for one prompt at a time."""

    def __init__(self, weights: DecoderWeights, cache: PagedCache) -> None:
        """Compiles what is needed."""
        self._weights = weights
        self._cache = cache
        self._kernels = PromptKernels(weights.shape, weights.head.device)
        self._captured: dict[tuple[int, int | None], _Captured] = {}
        """By tokens and kept states."""
        self._pool: Any = None
        self._packed = all(isinstance(layer.experts, PackedExperts) for layer in weights.layers)

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
        hidden = inputs.hidden.contiguous()
        tokens, half = len(hidden), self._weights.shape.head_dim // 2
        cosine, sine = self._weights.rotary(hidden[None], inputs.positions)
        places = _Places(cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous(), self._cache.tables[slot])
        captured = self._graph_for(tokens, states_after) if inputs.visual is None else None
        if captured is None:
            last = torch.full((1,), tokens - 1, device=hidden.device)
            return self._run(hidden, places, last, states_after, inputs)
        captured.hidden[:tokens] = hidden
        captured.places.cosine[:tokens], captured.places.sine[:tokens] = places.cosine, places.sine
        pages = min(len(captured.places.table), len(places.table))
        captured.places.table[:pages] = places.table[:pages]
        assert captured.places.filled is not None
        captured.places.filled.zero_()
        captured.places.filled[:tokens] = True
        captured.last.fill_(tokens - 1)
        captured.graph.replay()
        states = captured.states
        return captured.logits.clone(), states[:, :tokens].clone() if states is not None else None

    def _graph_for(self, tokens: int, states_after: int | None) -> _Captured | None:
        """The graph for a prompt; None where it is too long, or its experts are the model's own modules."""
        most = next((most for most in GRAPH_TOKENS if tokens <= most), None)
        if most is None or not self._packed:
            return None
        key = (most, states_after)
        if key not in self._captured:
            self._captured[key] = self._capture(most, states_after)
        return self._captured[key]

    def _capture(self, tokens: int, states_after: int | None) -> _Captured:
        weights, device = self._weights, self._weights.head.device
        hidden = torch.zeros((tokens, weights.shape.hidden), dtype=torch.bfloat16, device=device)
        rotary = torch.ones((2, tokens, weights.shape.head_dim // 2), dtype=torch.bfloat16, device=device)
        # Every token stands on the spare page until a prompt comes.
        table = torch.full((-(-tokens // PAGE),), self._cache.spare, dtype=torch.int32, device=device)
        filled = torch.ones((tokens, 1), dtype=torch.bool, device=device)
        places = _Places(rotary[0], rotary[1], table, filled)
        last = torch.zeros(1, dtype=torch.long, device=device)
        # Libraries choose kernels and take workspaces now.
        self._run(hidden, places, last, states_after)
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            logits, states = self._run(hidden, places, last, states_after)
        # Graphs run one by one and nothing of one is read after the next has begun: they share their memory.
        self._pool = self._pool or graph.pool()
        return _Captured(graph, hidden, places, last, logits, states)

    def _run(
        self,
        hidden: Tensor,
        places: _Places,
        last: Tensor,
        states_after: int | None,
        inputs: DecoderInputs | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The layers; logits of position `last` int64 ``[1]``, and the kept states."""
        weights, kernels, shape = self._weights, self._kernels, self._weights.shape
        hidden = hidden.clone()
        tokens = len(hidden)
        x = torch.empty_like(hidden)
        states = hidden[None].clone() if states_after == 0 else None
        for number, layer in enumerate(weights.layers):
            kernels.norm(hidden, layer.input_norm, weights.eps, x)
            qkv = self._linear(x, layer.qkv)
            kernels.place_heads(
                qkv, (layer.q_norm, layer.k_norm), weights.eps, (places.cosine, places.sine), places.table,
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
            hidden += self._experts(x, layer, places.filled)
            if states_after == number + 1:
                states = hidden[None].clone()
            if inputs is not None and inputs.visual is not None and number < len(inputs.deepstack):
                hidden[inputs.visual] += inputs.deepstack[number]
        row = hidden.index_select(0, last)
        normed = torch.empty_like(row)
        kernels.norm(row, weights.norm, weights.eps, normed)
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

    def _experts(self, x: Tensor, layer: Layer, filled: Tensor | None) -> Tensor:
        shape = self._weights.shape
        probabilities = torch.softmax(F.linear(x, layer.router), dim=-1, dtype=torch.float)
        chosen, index = torch.topk(probabilities, shape.top_k, dim=-1)
        if shape.normalise_top_k:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        chosen = chosen.to(x.dtype)
        if filled is not None:
            index = torch.where(filled, index, -1)
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
