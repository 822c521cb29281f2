"""One answer's text: its options, where it ends, and what is shown of it; an engine makes its tokens."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from omnifp4.chat.answer import FinishReason
from omnifp4.chat.errors import ChatError
from omnifp4.chat.inputs import ModelInputs
from omnifp4.chat.text_stream import TextStream
from omnifp4.decoding.engine import Engine, Sampling, Sequence
from omnifp4.decoding.speech_choice import check_name


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
        speech_engine: what makes the speech, one of `omnifp4.decoding.speech_choice.ENGINES`.
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
    speech_engine: str = "auto"

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
        check_name(result.speech_engine)
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


def sampling_of(options: Options, defaults: Any) -> Sampling:
    """What an answer's options and the checkpoint's generation_config (None: it has none) say together."""

    def value(name: str, otherwise: Any) -> Any:
        own = getattr(options, name)
        return own if own is not None else (getattr(defaults, name, None) or otherwise)

    greedy = not getattr(defaults, "do_sample", False) if options.temperature is None else not options.temperature
    return Sampling(
        temperature=0.0 if greedy else float(value("temperature", 1.0)),
        top_k=int(value("top_k", 0)),
        top_p=float(value("top_p", 1.0)),
        repetition_penalty=float(value("repetition_penalty", 1.0)),
        seed=options.seed,
    )


class TextRun:
    """One answer's text in the making.

    It gives its place in the engine back when it ends, by itself or because nobody holds it any more.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: ModelInputs,
        tokenizer: Any,
        sampling: Sampling,
        eos: frozenset[int],
        options: Options,
        *,
        keep_states: bool = False,
    ) -> None:
        """Takes no place yet; `keep_states` keeps the hidden states that speech needs."""
        self._engine = engine
        self._inputs = inputs
        self._sampling = sampling
        self._eos = eos
        self._options = options
        self._keep_states = keep_states
        self._stream = TextStream(tokenizer, options.stop)
        self._sequence: Sequence | None = None
        self._give_back: Callable[[], object] = lambda: None
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.first_token_at = 0.0
        self.last_token_at = 0.0

    @property
    def text(self) -> str:
        return self._stream.text

    @property
    def inputs(self) -> ModelInputs:
        """The prompt."""
        return self._inputs

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._inputs.prompt_tokens

    @property
    def is_at_end(self) -> bool:
        """Whether the engine need not go on, told by the tokens alone; `collect` may find a stop string besides."""
        made = [] if self._sequence is None else self._sequence.tokens
        return self.finish_reason is not None or bool(
            made and (made[-1] in self._eos or len(made) >= self._options.max_new_tokens)
        )

    @property
    def sequence(self) -> Sequence | None:
        """What the engine steps; None before `begin`."""
        return self._sequence

    @property
    def states(self) -> Any:
        """Hidden states of the prompt, ``(1, tokens, hidden)``; None if not kept, or not begun."""
        return None if self._sequence is None else self._sequence.states

    def advance(self) -> str:
        """Makes one token; returns the text that became final, often none."""
        if self.finish_reason is not None:
            return ""
        if self._sequence is None:
            return self.begin()
        self._engine.step([self._sequence])
        return self.collect()

    def begin(self) -> str:
        """Takes a place in the engine and makes the first token; returns as `advance`.

        Raises:
            EngineFull: there is no place now; this may be called again.
        """
        self.open()
        return self.collect()

    def open(self) -> None:
        """As `begin`, but leaves what the engine has made to `collect`, which another thread may call."""
        sequence = self._engine.start(
            self._inputs, self._sampling, most_tokens=self._options.max_new_tokens, keep_states=self._keep_states
        )
        self._give_back = weakref.finalize(self, self._engine.stop, sequence)
        self._sequence = sequence

    def collect(self) -> str:
        """Takes what the engine has made since; returns as `advance`."""
        pieces = []
        made = [] if self._sequence is None else self._sequence.tokens
        while self.finish_reason is None and len(self.tokens) < len(made):
            pieces.append(self._take(made[len(self.tokens)]))
        return "".join(pieces)

    def interrupt(self) -> str:
        """Ends it here; returns text that was held back."""
        if self.finish_reason is not None:
            return ""
        self._end("interrupted")
        return self._stream.finish()

    def _take(self, token: int) -> str:
        self.tokens.append(token)
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        if token in self._eos:
            self._end("eos")
            return self._stream.finish()
        piece = self._stream.add(token)
        full = len(self.tokens) >= self._options.max_new_tokens
        if full:
            piece += self._stream.finish()
        if self._stream.stopped:
            self._end("stop")
        elif full:
            self._end("length")
        return piece

    def _end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._give_back()


def eos_tokens(model: Any) -> frozenset[int]:
    """Ids that end an answer: the config's end marker and what generation_config names, never a built-in number."""
    ids = {model.config.im_end_token_id}
    for config in (getattr(model, "generation_config", None), getattr(model.thinker, "generation_config", None)):
        named = getattr(config, "eos_token_id", None)
        ids |= set(named if isinstance(named, list | tuple) else [named])
    vocabulary = model.config.thinker_config.text_config.vocab_size
    return frozenset(int(token) for token in ids if token is not None and 0 <= token < vocabulary)
