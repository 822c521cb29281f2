"""One decode step, from the tokens of all rows to their next tokens, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor

from omnifp4.decoding.decoder_weights import DecoderWeights
from omnifp4.decoding.paged_cache import PagedCache
from omnifp4.kernels.cuda.decoder import DecoderKernels
from omnifp4.kernels.cuda.sampling import SamplingKernels
from omnifp4.kernels.cuda.shapes import MOST_ROWS

Draw = Literal["greatest", "top", "all"]
"""How tokens are drawn: the greatest logit; from the greatest `TOP_CANDIDATES`; from the whole vocabulary."""

ROW_COUNTS: Final = (1, 2, 4, 8, 16, MOST_ROWS)
"""A step is captured for these numbers of rows; idle rows fill up."""


@dataclass
class SlotState:
    """What the device knows of each slot between steps; all ``[slots]``.

    Attributes:
        tokens: int32, the token that the next step reads.
        lengths: int32, tokens in the cache.
        shifts: int32, rotary position minus length.
        made: int32, tokens drawn so far.
        temperatures: float32; 0 is greedy.
        top_ks: int32; 0 means all.
        top_ps: float32.
        penalties: float32.
        seeds: int64.
        seen: uint8 ``[slots, vocabulary]``, tokens of prompt and text; None until a sequence has a penalty.
    """

    tokens: Tensor
    lengths: Tensor
    shifts: Tensor
    made: Tensor
    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    penalties: Tensor
    seeds: Tensor
    seen: Tensor | None = None

    @classmethod
    def empty(cls, slots: int, device: torch.device) -> SlotState:
        """All slots idle."""

        def new(dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, dtype=dtype, device=device)

        i32, f32 = torch.int32, torch.float32
        return cls(
            new(i32), new(i32), new(i32), new(i32), new(f32), new(i32), new(f32) + 1, new(f32) + 1, new(torch.int64)
        )


@dataclass
class StepBuffers:
    """Activations of a step, BF16, for up to `MOST_ROWS` rows; shared by all captured steps, which run one by one."""

    residual: Tensor
    natural: Tensor
    fp4_order: Tensor
    qkv: Tensor
    heads: Tensor
    inner: Tensor
    outer: Tensor
    logits: Tensor
    rows: Tensor
    places: Tensor
    recent: Tensor

    @classmethod
    def empty(cls, weights: DecoderWeights, device: torch.device) -> StepBuffers:
        """Zeros: idle rows hold numbers."""
        shape, most = weights.shape, MOST_ROWS

        def new(rows: int, columns: int) -> Tensor:
            return torch.zeros((rows, columns), dtype=torch.bfloat16, device=device)

        return cls(
            residual=new(most, shape.hidden),
            natural=new(most, shape.hidden),
            fp4_order=new(most, shape.hidden),
            qkv=new(most, shape.qkv),
            heads=new(most, shape.heads * shape.head_dim),
            inner=new(most * shape.top_k, shape.inner),
            outer=new(most * shape.top_k, shape.hidden),
            logits=new(most, weights.head.shape[0]),
            rows=torch.full((most,), -1, dtype=torch.int32, device=device),
            places=torch.zeros((most, 4), dtype=torch.int32, device=device),
            recent=torch.zeros(most, dtype=torch.int32, device=device),
        )


@dataclass
class DecodeStep:
    """The kernels of a step for a number of rows, and its graphs.

    Attributes:
        weights: of the model.
        rotary: cosines and sines BF16 ``[positions, head_dim / 2]``.
        cache: pages of all slots.
        state: of all slots.
        buffers: shared activations.
        rows: of this step.
    """

    weights: DecoderWeights
    rotary: tuple[Tensor, Tensor]
    cache: PagedCache
    state: SlotState
    buffers: StepBuffers
    rows: int
    _graphs: dict[tuple[Draw, bool], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.weights.head.device
        self.kernels = DecoderKernels(self.weights.shape, self.rows, device, self.weights.fp4)
        self.sampling = SamplingKernels(self.weights.head.shape[0], device)
        self.routing = [self.kernels.routing_buffers() for _ in self.weights.layers]
        self._splits = self.kernels.split_buffers()

    def enqueue(self, draw: Draw, penalty: bool) -> None:
        """Puts the step on the current stream."""
        self.enqueue_logits()
        rows, buffers = self.rows, self.buffers
        self.sampling.next_tokens(
            buffers.logits[:rows], buffers.rows[:rows], self.state, buffers.recent[:rows], draw, penalty
        )

    def enqueue_logits(self) -> None:
        """The step without the drawing: `buffers.logits` ``[rows, vocabulary]``."""
        kernels, weights, b, n = self.kernels, self.weights, self.buffers, self.rows
        fp4, eps, single = weights.fp4, weights.eps, self.rows == 1
        kernels.embed(
            weights.embeddings, b.rows, (self.state.tokens, self.state.lengths, self.state.shifts), b.residual, b.places
        )

        def norm(weight: Tensor, *, for_fp4: bool, natural: bool, add: Any = None) -> None:
            kernels.norm(
                b.residual,
                weight,
                eps,
                natural=b.natural if natural or not for_fp4 else None,
                fp4_order=b.fp4_order if for_fp4 else None,
                add=add,
            )

        if not single:
            norm(weights.layers[0].input_norm, for_fp4=fp4["qkv"], natural=False)
        for number, (layer, routing) in enumerate(zip(weights.layers, self.routing, strict=True)):
            x = b.residual if single else b.fp4_order if fp4["qkv"] else b.natural
            kernels.qkv(layer.qkv, x, layer.input_norm if single else None, eps, b.qkv)
            kernels.attention(
                b.qkv,
                (layer.q_norm, layer.k_norm),
                eps,
                self.rotary,
                b.places,
                self.cache.tables,
                (self.cache.keys[number], self.cache.values[number]),
                self._splits,
                b.heads,
            )
            kernels.o(layer.o, b.heads, b.residual)
            for_experts = b.fp4_order if fp4["experts"] else b.natural
            if single:
                kernels.router(layer.router, b.residual, layer.post_attention_norm, eps, for_experts, b.places, routing)
            else:
                norm(layer.post_attention_norm, for_fp4=fp4["experts"], natural=True)
                kernels.router(layer.router, b.natural, None, eps, None, b.places, routing)
            kernels.gate_up(layer.gate_up, for_experts, routing, b.inner)
            kernels.down(layer.down, b.inner, routing, b.residual if single else b.outer)
            if not single:
                last = number + 1 == len(weights.layers)
                following = weights.norm if last else weights.layers[number + 1].input_norm
                norm(following, for_fp4=fp4["qkv"] and not last, natural=last, add=(b.outer, routing))
        if single:
            norm(weights.norm, for_fp4=False, natural=True)
        torch.mm(b.natural[:n], weights.head.t(), out=b.logits[:n])

    def graph(self, draw: Draw, penalty: bool, before: Callable[[], None]) -> Any:
        """The captured step.

        Args:
            draw: how tokens are drawn.
            penalty: whether a row has a repetition penalty.
            before: puts the state in order so that a run of the step changes nothing that matters; called first.
        """
        key = (draw, penalty)
        if key not in self._graphs:
            before()
            self.enqueue(draw, penalty)  # libraries choose kernels and take workspaces now
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self.enqueue(draw, penalty)
            self._graphs[key] = graph
        return self._graphs[key]

    @property
    def distinct_experts(self) -> Tensor:
        """Experts that had tokens in the last step, int32 ``[layers]``."""
        if self.rows == 1:
            return torch.full((len(self.routing),), self.weights.shape.top_k, dtype=torch.int32)
        return torch.stack([routing.counts[1] for routing in self.routing])
