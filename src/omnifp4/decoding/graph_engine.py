"""The engine of own kernels: paged cache, one CUDA graph a step, drawing on the device.

A step that is asked for has been started by the call before: the device goes on with the tokens that it drew itself
while the host looks at the last ones. A sequence that ends early wastes one row of one step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from omnifp4.decoding import decoder_weights
from omnifp4.decoding.decoder_weights import read_weights, thinker_of
from omnifp4.decoding.engine import DecodingError, Engine, EngineName, Sampling, Sequence
from omnifp4.decoding.paged_cache import PagedCache, page_bytes, pages_for
from omnifp4.decoding.prefill import Prefill, decoder_inputs
from omnifp4.decoding.sampling import damaged
from omnifp4.decoding.step_graph import ROW_COUNTS, DecodeStep, Draw, SlotState, StepBuffers
from omnifp4.kernels.cuda.compiler import LEAST_CAPABILITY, why_not_here
from omnifp4.kernels.cuda.decoder_plan import Processor
from omnifp4.kernels.cuda.sampling import TOP_CANDIDATES
from omnifp4.kernels.cuda.shapes import MOST_ROWS, PAGE

if TYPE_CHECKING:
    from omnifp4.chat.inputs import ModelInputs

USUAL_CONTEXT: Final = 32_768
"""Tokens of one sequence where nobody says otherwise."""
MEMORY_SHARE: Final = 0.8
"""Of the memory that is free when the engine is made; the rest is for prompts and speech."""
STEPS_AHEAD: Final = 1
"""Steps that run before their tokens are asked for."""


def why_not(model: Any, *, most_sequences: int = 1, context_tokens: int | None = None) -> str:
    """Why this engine cannot run the model here; empty if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    thinker = thinker_of(model)
    if not hasattr(thinker, "lm_head"):
        return "it has no head of a kind that is known"
    device = thinker.lm_head.weight.device
    if device.type != "cuda":
        return f"the model is on {device}"
    if any(parameter.device != device for parameter in thinker.parameters()):
        return "the model is spread over several devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    if most_sequences > MOST_ROWS:
        return f"{most_sequences} sequences at once are more than {MOST_ROWS}"
    if reason := why_not_here():
        return reason
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed, and prompts need it"
    return decoder_weights.why_not(model) or decoder_weights.why_not_cut(model, Processor.of(device), most_sequences)


@dataclass
class _Row:
    """A sequence under way: its slot, tokens that are drawn but not asked for, and steps under way."""

    sequence: Sequence
    slot: int
    sampling: Sampling
    ready: deque[int] = field(default_factory=deque)
    launched: int = 0


@dataclass
class _Launched:
    """A step under way: whom it is for, and where its tokens will be when the event has passed."""

    rows: list[_Row]
    tokens: Tensor
    done: Any


class GraphEngine(Engine):
    """See the module."""

    name: EngineName = "cuda-graph"

    def __init__(
        self,
        model: Any,
        *,
        most_sequences: int = 1,
        context_tokens: int | None = None,
        reason: str = "as asked for",
    ) -> None:
        """Takes the cache's memory; steps are captured when they are first needed.

        Args:
            model: with a thinker, on one GPU.
            most_sequences: that may be under way at once, up to `MOST_ROWS`.
            context_tokens: the most of one sequence; None takes the config's, `USUAL_CONTEXT` at most, and less where
                the memory does not hold that.
            reason: why this engine was chosen.

        Raises:
            DecodingError: the cache does not fit the memory, or a scale is damaged.
        """
        self.reason = reason
        self.most_sequences = most_sequences
        thinker = thinker_of(model)
        most: int = thinker.get_decoder().config.max_position_embeddings
        self._model = model
        self._device = thinker.lm_head.weight.device
        self._lock = threading.RLock()
        self._stopped: deque[Sequence] = deque()
        self._rows: dict[int, _Row] = {}
        self._steps: dict[int, DecodeStep] = {}
        self._launched: deque[_Launched] = deque()
        self._closed = False
        with torch.cuda.device(self._device), torch.no_grad():
            self._stream = _stream_of(self._device)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._weights = read_weights(model)
                self.context_tokens, pages = self._room(min(context_tokens or USUAL_CONTEXT, most), context_tokens)
                shape, layers = self._weights.shape, len(self._weights.layers)
                self._cache = PagedCache(shape, layers, most_sequences, self.context_tokens, pages, self._device)
                self._state = SlotState.empty(most_sequences, self._device)
                self._buffers = StepBuffers.empty(self._weights, self._device)
                # Media may move rotary positions ahead of the number of tokens.
                self._positions = 2 * self.context_tokens + PAGE
                self._rotary = self._rotary_table()
                self._prefill = Prefill(self._weights, self._cache)
        self._on_device: list[int] = []
        self._pinned = [torch.zeros(MOST_ROWS, dtype=torch.int32).pin_memory() for _ in range(STEPS_AHEAD + 2)]
        self._turn = 0
        config = getattr(model, "config", None)
        talker = getattr(config, "talker_config", None)
        self._states_after = getattr(talker, "accept_hidden_layer", None)

    def start(
        self, inputs: ModelInputs, sampling: Sampling, *, most_tokens: int, keep_states: bool = False
    ) -> Sequence:
        self.check_room(inputs, most_tokens)
        with self._lock, self._on_stream():
            if self._closed:
                raise DecodingError("the engine is closed", hint="choose_engine makes a new one")
            self._free_stopped()
            slot = self._cache.take(inputs.prompt_tokens + most_tokens)
            try:
                sequence = self._read(inputs, sampling, slot, most_tokens, keep_states)
            except BaseException:
                self._cache.give_back(slot)
                raise
            self._rows[id(sequence)] = _Row(sequence, slot, sampling)
            return sequence

    def step(self, sequences: Iterable[Sequence] | None = None) -> None:
        with self._lock, self._on_stream():
            self._free_stopped()
            rows = list(self._rows.values()) if sequences is None else [self._row(one) for one in sequences]
            if not rows:
                return
            lacking = [row for row in rows if not row.ready and not row.launched]
            for begin in range(0, len(lacking), MOST_ROWS):
                self._launch(lacking[begin : begin + MOST_ROWS])
            if len(rows) <= MOST_ROWS and all(row.launched + len(row.ready) <= STEPS_AHEAD for row in rows):
                ahead = [row for row in rows if self._left(row) > 0]
                if ahead:
                    self._launch(ahead)
            while any(not row.ready for row in rows):
                self._collect()
            for row in rows:
                token = row.ready.popleft()
                if token < 0:
                    raise damaged(row.sequence.prompt_tokens + len(row.sequence.tokens))
                row.sequence.tokens.append(token)

    def stop(self, sequence: Sequence) -> None:
        # May come from the garbage collector: nothing is done here but a note.
        self._stopped.append(sequence)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            torch.cuda.synchronize(self._device)
            self._rows.clear()
            self._launched.clear()
            self._steps.clear()
            del self._cache, self._state, self._buffers, self._prefill, self._rotary

    def distinct_experts(self) -> Tensor | None:
        """Experts that had tokens in the last step, int32 ``[layers]``; None before the first."""
        with self._lock, self._on_stream():
            step = self._steps.get(_bucket(len(self._on_device))) if self._on_device else None
            return None if step is None else step.distinct_experts.cpu()

    @property
    def cache_bytes(self) -> int:
        """Memory of the paged cache."""
        return 2 * self._cache.keys.numel() * self._cache.keys.element_size()

    def _room(self, context: int, asked: int | None) -> tuple[int, int]:
        """The context, and pages of the cache."""
        one = page_bytes(self._weights.shape, len(self._weights.layers))
        free = torch.cuda.mem_get_info(self._device)[0]
        affordable = int(free * MEMORY_SHARE) // one
        if affordable < pages_for(context):
            if asked is not None or affordable < 4:
                raise DecodingError(
                    f"a cache for {context} tokens takes {pages_for(context) * one / 1e9:.1f} GB and the GPU has "
                    f"{free / 1e9:.1f} GB free",
                    hint="lower the context",
                )
            context = affordable * PAGE
        return context, min(affordable, self.most_sequences * pages_for(context))

    def _rotary_table(self) -> tuple[Tensor, Tensor]:
        half = self._weights.shape.head_dim // 2
        positions = torch.arange(self._positions, device=self._device).view(1, 1, -1).expand(3, 1, -1)
        dummy = torch.zeros(1, dtype=torch.bfloat16, device=self._device)
        cosine, sine = self._weights.rotary(dummy, positions)
        return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self._stream)

    def _read(
        self, inputs: ModelInputs, sampling: Sampling, slot: int, most_tokens: int, keep_states: bool
    ) -> Sequence:
        """Prefill, and the first token."""
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.no_grad():
            decoder = decoder_inputs(self._model, inputs)
            tokens = inputs.prompt_tokens
            if tokens + most_tokens + decoder.shift >= self._positions:
                raise DecodingError(
                    f"the prompt's media put its rotary positions {decoder.shift} ahead of its {tokens} tokens, beyond "
                    f"the engine's {self._positions}"
                )
            logits, states = self._prefill.run(decoder, slot, self._states_after if keep_states else None)
            state, ids = self._state, inputs.tensors["input_ids"]
            if sampling.repetition_penalty != 1 and state.seen is None:
                vocabulary = self._weights.head.shape[0]
                state.seen = torch.zeros((self.most_sequences, vocabulary), dtype=torch.uint8, device=self._device)
                self._settle()
                self._steps.clear()  # captured without it
            if state.seen is not None:
                state.seen[slot].zero_()
                state.seen[slot].index_fill_(0, ids[0], 1)
            values: list[tuple[Tensor, float]] = [
                (state.lengths, tokens - 1), (state.shifts, decoder.shift), (state.made, 0),
                (state.temperatures, sampling.temperature), (state.top_ks, sampling.top_k), (state.top_ps, sampling.top_p),
                (state.penalties, sampling.repetition_penalty), (state.seeds, sampling.seed),
            ]  # fmt: skip
            for tensor, value in values:
                tensor[slot] = value
            row = torch.full((1,), slot, dtype=torch.int32, device=self._device)
            recent = torch.zeros(1, dtype=torch.int32, device=self._device)
            sampler = self._step_for(1).sampling
            # Drawing adds one to the length: the prompt's last token counts from here.
            sampler.next_tokens(logits, row, state, recent, _draw([sampling]), _penalty([sampling]))
            token = int(recent)
        if token < 0:
            raise damaged(tokens)
        return Sequence(tokens, most_tokens, tokens=[token], states=states)

    def _step_for(self, rows: int) -> DecodeStep:
        count = _bucket(rows)
        if count not in self._steps:
            self._steps[count] = DecodeStep(self._weights, self._rotary, self._cache, self._state, self._buffers, count)
        return self._steps[count]

    def _launch(self, rows: list[_Row]) -> None:
        """Starts a step for these sequences."""
        samplings = [row.sampling for row in rows]
        step = self._step_for(len(rows))

        def idle() -> None:
            self._buffers.rows.fill_(-1)
            self._on_device = []

        graph = step.graph(_draw(samplings), _penalty(samplings), idle)
        slots = [row.slot for row in rows]
        if slots != self._on_device:
            padded = torch.tensor(slots + [-1] * (MOST_ROWS - len(slots)), dtype=torch.int32)
            self._buffers.rows.copy_(padded.to(self._device))
            self._on_device = slots
        graph.replay()
        tokens = self._pinned[self._turn % len(self._pinned)]
        self._turn += 1
        tokens.copy_(self._buffers.recent, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self._stream)
        for row in rows:
            row.launched += 1
        self._launched.append(_Launched(rows, tokens, done))

    def _collect(self) -> None:
        """Waits for the oldest step."""
        launched = self._launched.popleft()
        launched.done.synchronize()
        tokens = launched.tokens.tolist()
        for row, token in zip(launched.rows, tokens, strict=False):
            row.launched -= 1
            row.ready.append(token)

    def _settle(self) -> None:
        """Waits for all steps under way."""
        while self._launched:
            self._collect()

    def _left(self, row: _Row) -> int:
        sequence = row.sequence
        return sequence.most_tokens - len(sequence.tokens) - len(row.ready) - row.launched

    def _row(self, sequence: Sequence) -> _Row:
        row = self._rows.get(id(sequence))
        if row is None:
            raise DecodingError("the sequence is not under way: it was stopped, or is another engine's")
        if len(sequence.tokens) >= sequence.most_tokens:
            raise DecodingError(f"the sequence has all of its {sequence.most_tokens} tokens", hint="stop it")
        return row

    def _free_stopped(self) -> None:
        while self._stopped:
            row = self._rows.pop(id(self._stopped.popleft()), None)
            if row is not None:
                # Steps under way may still write to its pages; whoever takes them next does so later in the stream.
                self._cache.give_back(row.slot)


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all engines of a device: cuBLAS keeps 32 MiB for every stream that it ever worked on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _bucket(rows: int) -> int:
    return next(count for count in ROW_COUNTS if rows <= count)


def _draw(samplings: list[Sampling]) -> Draw:
    drawn = [one for one in samplings if one.temperature > 0]
    if not drawn:
        return "greatest"
    return "top" if all(0 < one.top_k <= TOP_CANDIDATES for one in drawn) else "all"


def _penalty(samplings: list[Sampling]) -> bool:
    return any(one.repetition_penalty != 1 for one in samplings)
