"""Text, token by token, from a thinker; and one reader for all that ``generate()`` returns.

The loop is our own rather than ``generate()``, for what that cannot do: give each token as it comes, stop between two
tokens, go on later from the same cache, draw from its own random numbers, and keep of a long prompt only what speech
needs - the logits of the last position and the hidden states of one layer, where ``generate()`` keeps the logits of
every position (10 GB at 32,000 tokens) and the states of all layers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

from omnifp4.chat.answer import FinishReason
from omnifp4.chat.errors import ChatError
from omnifp4.chat.inputs import ModelInputs
from omnifp4.chat.text_stream import TextStream

_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def model_lock(model: Any) -> threading.RLock:
    """Held while hooks or borrowed methods sit on a model, or a part of one, that several chats may share."""
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())


@dataclass(frozen=True, slots=True)
class Options:
    """How an answer is made.

    Attributes:
        max_new_tokens: the most tokens of text.
        temperature: 0 takes the likeliest token; None what the checkpoint's generation_config says, else 0.
        top_p: nucleus; None as above.
        top_k: candidates; None as above.
        repetition_penalty: above 1 discourages repetition; None as above.
        seed: of text and speech; the same seed gives the same answer.
        stop: strings that end the text; they are not part of it.
        max_speech_seconds: the most speech.
        speech_temperature: of the talker; 0 takes the likeliest code.
    """

    max_new_tokens: int = 1024
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_speech_seconds: float = 300.0
    speech_temperature: float = 0.9

    def changed(self, **options: Any) -> Options:
        """A copy with some values changed and checked.

        Raises:
            ChatError: an unknown option, or a value out of range.
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                raise ChatError(f"there is no option {name!r}", hint=f"allowed: {', '.join(known)}")
        stop = options.get("stop", self.stop)
        result = replace(self, **{**options, "stop": (stop,) if isinstance(stop, str) else tuple(stop or ())})
        for name, low, high in _RANGES:
            value = getattr(result, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                raise ChatError(f"{name} is {value!r}", hint=f"allowed: {low:g} to {high:g}")
            if name in _WHOLE and not isinstance(value, int):
                raise ChatError(f"{name} is {value!r}", hint="a whole number")
        if not all(isinstance(one, str) and one for one in result.stop):
            raise ChatError(f"stop is {result.stop!r}", hint="strings that are not empty")
        return result


_OPTIONAL = ("temperature", "top_p", "top_k", "repetition_penalty")
_WHOLE = ("max_new_tokens", "top_k", "seed")
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_new_tokens", 1, 1_000_000),
    ("temperature", 0, 10),
    ("top_p", 1e-6, 1),
    ("top_k", 0, 1_000_000),
    ("repetition_penalty", 0.1, 10),
    ("seed", 0, 2**63 - 1),
    ("max_speech_seconds", 0.1, 3600),
    ("speech_temperature", 0, 10),
)


class Sampler:
    """Picks tokens with its own random numbers, in the order of steps that ``generate()`` uses."""

    def __init__(self, options: Options, defaults: Any, device: Any) -> None:
        """`defaults` is the checkpoint's generation_config, or None."""
        import torch
        from transformers.generation import logits_process as steps

        def value(name: str, otherwise: Any) -> Any:
            own = getattr(options, name)
            return own if own is not None else (getattr(defaults, name, None) or otherwise)

        greedy = not getattr(defaults, "do_sample", False) if options.temperature is None else not options.temperature
        penalty = value("repetition_penalty", 1.0)
        self._steps: list[Any] = []
        if penalty != 1:
            self._steps.append(steps.RepetitionPenaltyLogitsProcessor(float(penalty)))
        if not greedy:
            temperature, top_k, top_p = value("temperature", 1.0), value("top_k", 0), value("top_p", 1.0)
            if temperature != 1:
                self._steps.append(steps.TemperatureLogitsWarper(float(temperature)))
            if top_k:
                self._steps.append(steps.TopKLogitsWarper(int(top_k)))
            if top_p < 1:
                self._steps.append(steps.TopPLogitsWarper(float(top_p)))
        self._random = None if greedy else torch.Generator(device).manual_seed(options.seed)

    def pick(self, ids: Any, logits: Any) -> int:
        """The next token; `ids` has shape ``(1, tokens)``, `logits` ``(1, vocabulary)`` in float32.

        Raises:
            ChatError: the logits are not numbers.
        """
        import torch

        if not bool(torch.isfinite(logits.max())):
            raise ChatError(
                f"the model's output is not finite after {ids.shape[1]} tokens: its weights are damaged",
                hint="omnifp4 verify MODEL",
            )
        for step in self._steps:
            logits = step(ids, logits)
        if self._random is None:
            return int(logits.argmax())
        return int(torch.multinomial(logits.softmax(-1)[0], 1, generator=self._random))


class ThinkerDecoder:
    """The thinker with its cache: one prefill, then one token at a time.

    All state is here and none in the model, so conversations can take turns on one model.
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


class TextRun:
    """One answer's text in the making."""

    def __init__(
        self, decoder: Any, inputs: ModelInputs, tokenizer: Any, sampler: Sampler, eos: frozenset[int], options: Options
    ) -> None:
        """`decoder` is a `ThinkerDecoder`, or whatever has its `prefill` and `step`."""
        self._decoder = decoder
        self._inputs = inputs
        self._sampler = sampler
        self._eos = eos
        self._options = options
        self._stream = TextStream(tokenizer, options.stop)
        self._ids = inputs.tensors["input_ids"]
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.first_token_at = 0.0
        self.last_token_at = 0.0

    @property
    def text(self) -> str:
        return self._stream.text

    def advance(self) -> str:
        """Makes one token; returns the text that became final, often none."""
        import torch

        if self.finish_reason is not None:
            return ""
        logits = self._decoder.step(self.tokens[-1]) if self.tokens else self._decoder.prefill(self._inputs)
        token = self._sampler.pick(self._ids, logits)
        self._ids = torch.cat([self._ids, self._ids.new_tensor([[token]])], dim=1)
        self.tokens.append(token)
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        if token in self._eos:
            self.finish_reason = "eos"
            return self._stream.finish()
        piece = self._stream.add(token)
        full = len(self.tokens) >= self._options.max_new_tokens
        if full:
            piece += self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif full:
            self.finish_reason = "length"
        return piece

    def interrupt(self) -> str:
        """Ends it here; returns text that was held back."""
        if self.finish_reason is not None:
            return ""
        self.finish_reason = "interrupted"
        return self._stream.finish()


def eos_tokens(model: Any) -> frozenset[int]:
    """Ids that end an answer: the config's end marker and what generation_config names, never a built-in number."""
    ids = {model.config.im_end_token_id}
    for config in (getattr(model, "generation_config", None), getattr(model.thinker, "generation_config", None)):
        named = getattr(config, "eos_token_id", None)
        ids |= set(named if isinstance(named, list | tuple) else [named])
    vocabulary = model.config.thinker_config.text_config.vocab_size
    return frozenset(int(token) for token in ids if token is not None and 0 <= token < vocabulary)
