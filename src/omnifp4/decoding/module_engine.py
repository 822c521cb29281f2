"""The engine that runs anywhere: the model's own modules, one forward for each sequence and token.

The loop is our own rather than ``generate()``, for what that cannot do: give each token as it comes, stop between two
tokens, go on later from the same cache, draw from its own random numbers, and keep of a long prompt only what speech
needs - the logits of the last position and the hidden states of one layer, where ``generate()`` keeps the logits of
every position (10 GB at 32,000 tokens) and the states of all layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from omnifp4.decoding.engine import DecodingError, Engine, EngineFull, EngineName, Sampling, Sequence
from omnifp4.decoding.model_lock import model_lock
from omnifp4.decoding.sampling import Sampler

if TYPE_CHECKING:
    from omnifp4.chat.inputs import ModelInputs

PLACES: Final = 64
"""Sequences at once, at least: a place costs nothing before it is used."""


class ThinkerDecoder:
    """The thinker with the cache of one sequence: one prefill, then one token at a time.

    All state is here and none in the model, so sequences can take turns on one model.
    """

    def __init__(self, model: Any, *, keep_states: bool) -> None:
        """`keep_states`: keep the hidden states that the talker reads."""
        self._thinker = model.thinker
        self._lock = model_lock(model.thinker)
        self._layer = model.config.talker_config.accept_hidden_layer if keep_states else None
        self._cache: Any = None
        self._shift: Any = None
        self._length = 0
        self.states: Any = None
        """Hidden states of the prompt that the talker reads, shape ``(1, tokens, hidden)``; None if not kept."""

    def prefill(self, inputs: ModelInputs) -> Any:
        """Reads the prompt; returns the next token's logits, float32, shape ``(1, vocabulary)``."""
        import torch

        tensors = dict(inputs.tensors)
        ids, mask = tensors["input_ids"], tensors["attention_mask"]
        audio_mask = tensors.get("feature_attention_mask")
        with torch.no_grad(), self._lock, self._only_what_is_read():
            positions, self._shift = self._thinker.get_rope_index(
                ids,
                image_grid_thw=tensors.get("image_grid_thw"),
                video_grid_thw=tensors.get("video_grid_thw"),
                attention_mask=mask,
                use_audio_in_video=inputs.sound_in_video,
                audio_seqlens=None if audio_mask is None else audio_mask.sum(-1),
                second_per_grids=tensors.get("video_second_per_grid"),
            )
            text_positions = torch.arange(ids.shape[1], device=ids.device).view(1, 1, -1)
            positions = torch.cat([text_positions, positions.to(ids.device)])
            output = self._thinker(
                **tensors, position_ids=positions, use_audio_in_video=inputs.sound_in_video, use_cache=True
            )
        self._cache = output.past_key_values
        self._length = ids.shape[1]
        return output.logits[:, -1].float()

    def step(self, token: int) -> Any:
        """Reads one more token; returns as `prefill`."""
        import torch

        device = self._shift.device
        place = torch.tensor([[[self._length]]], device=device)
        positions = torch.cat([place, (place + self._shift.view(1, 1, 1)).expand(3, 1, 1)])
        with torch.no_grad():
            output = self._thinker(
                input_ids=torch.tensor([[token]], device=device),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        self._length += 1
        return output.logits[:, -1].float()

    @contextmanager
    def _only_what_is_read(self) -> Iterator[None]:
        hooks = [self._thinker.lm_head.register_forward_pre_hook(lambda _, values: (values[0][:, -1:],))]
        if self._layer is not None:
            text = self._thinker.get_decoder()

            def keep(_: Any, __: Any, output: Any) -> None:
                self.states = output[0] if isinstance(output, tuple) else output

            # What `output_hidden_states` calls number k is what layer k - 1 gives, or the norm after the last.
            read = text.layers[self._layer - 1] if self._layer < len(text.layers) else text.norm
            hooks.append(read.register_forward_hook(keep))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(slots=True)
class _Making:
    """A sequence under way with what makes it; `ids` is prompt and text so far, ``(1, tokens)``."""

    sequence: Sequence
    decoder: ThinkerDecoder
    sampler: Sampler
    ids: Any

    def take(self, logits: Any) -> None:
        import torch

        token = self.sampler.pick(self.ids, logits)
        self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)
        self.sequence.tokens.append(token)


class ModuleEngine(Engine):
    """Runs the stock modules, on the CPU or a GPU, with a cache for each sequence that grows as it does."""

    name: EngineName = "modules"

    def __init__(
        self,
        model: Any,
        *,
        most_sequences: int = 1,
        context_tokens: int | None = None,
        reason: str = "as asked for",
        decoder: Callable[..., ThinkerDecoder] = ThinkerDecoder,
    ) -> None:
        """Takes no memory yet.

        Args:
            model: with a thinker.
            most_sequences: that must be possible at once; there are `PLACES` in any case.
            context_tokens: the most of one sequence; None takes the config's.
            reason: why this engine was chosen.
            decoder: makes one sequence's logits.
        """
        self.reason = reason
        self.most_sequences = max(most_sequences, PLACES)
        most: int = model.config.thinker_config.text_config.max_position_embeddings
        self.context_tokens = min(context_tokens or most, most)
        self._model = model
        self._decoder = decoder
        self._lock = threading.RLock()
        self._under_way: dict[int, _Making] = {}
        self._closed = False

    def start(
        self, inputs: ModelInputs, sampling: Sampling, *, most_tokens: int, keep_states: bool = False
    ) -> Sequence:
        self.check_room(inputs, most_tokens)
        with self._lock:
            if self._closed:
                raise DecodingError("the engine is closed", hint="choose_engine makes a new one")
            if len(self._under_way) >= self.most_sequences:
                raise EngineFull(f"{len(self._under_way)} sequences are under way, the most at once")
            decoder = self._decoder(self._model, keep_states=keep_states)
            logits = decoder.prefill(inputs)
            sequence = Sequence(inputs.prompt_tokens, most_tokens, states=decoder.states)
            making = _Making(sequence, decoder, Sampler(sampling, logits.device), inputs.tensors["input_ids"])
            making.take(logits)
            self._under_way[id(sequence)] = making
            return sequence

    def step(self, sequences: Iterable[Sequence] | None = None) -> None:
        with self._lock:
            chosen = [one.sequence for one in list(self._under_way.values())] if sequences is None else list(sequences)
            for sequence in chosen:
                making = self._under_way.get(id(sequence))
                if making is None:
                    if sequences is None:
                        continue  # stopped by another thread in this very step
                    raise DecodingError("the sequence is not under way: it was stopped, or is another engine's")
                if len(sequence.tokens) >= sequence.most_tokens:
                    raise DecodingError(f"the sequence has all of its {sequence.most_tokens} tokens", hint="stop it")
                making.take(making.decoder.step(sequence.tokens[-1]))

    def stop(self, sequence: Sequence) -> None:
        # One operation on a dict needs no lock, and a step under way holds what it works on.
        self._under_way.pop(id(sequence), None)

    def close(self) -> None:
        self._closed = True
        self._under_way.clear()
