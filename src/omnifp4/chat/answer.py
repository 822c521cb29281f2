"""What a turn gives: pieces while it is made, and the whole answer with its figures at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Waveform = NDArray[np.float32]
"""Mono samples in [-1, 1], shape ``(samples,)``."""

SAMPLING_RATE = 24_000
"""Samples a second of the model's speech."""

FinishReason = Literal["eos", "length", "stop", "interrupted"]


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that is final: a later piece never changes it."""

    text: str


@dataclass(frozen=True, slots=True)
class SpeechPiece:
    """Speech that follows without a gap on what came before; 24 kHz."""

    waveform: Waveform


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of one answer.

    Attributes:
        prompt_tokens: of the whole conversation as the model read it.
        new_tokens: generated, the end marker included.
        seconds_to_first_token: from the call, so reading the media is in it.
        tokens_per_second: of the tokens after the first; 0 where there is none.
        peak_bytes: most memory in use: allocated on the GPU during this answer, or by this process since its start.
        peak_where: ``cuda`` or ``process``.
        speech_seconds: length of the speech; 0 where there is none.
        speech_seconds_taken: time that making it took.
        turns_left_out: oldest turns that did not fit the context.
        notes: what was done by rule, such as an audio cut to its limit.
    """

    prompt_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float
    peak_bytes: int
    peak_where: Literal["cuda", "process"]
    speech_seconds: float = 0.0
    speech_seconds_taken: float = 0.0
    turns_left_out: int = 0
    notes: tuple[str, ...] = ()

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of work for a second of speech: below 1 it is made faster than it is heard."""
        return self.speech_seconds_taken / self.speech_seconds if self.speech_seconds else None

    def line(self) -> str:
        """One line for a person."""
        text = (
            f"{self.prompt_tokens} + {self.new_tokens} tokens, first after {self.seconds_to_first_token:.2f} s, "
            f"{self.tokens_per_second:.1f} tok/s, peak {self.peak_bytes / 1e9:.2f} GB ({self.peak_where})"
        )
        if self.real_time_factor is not None:
            text += f", speech {self.speech_seconds:.1f} s at real-time factor {self.real_time_factor:.2f}"
        if self.turns_left_out:
            text += f", {self.turns_left_out} oldest turns left out"
        return "; ".join([text, *self.notes])


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        text: without end marker and stop string.
        waveform: the speech, or None where none was asked for or there was nothing to say.
        tokens: ids of the text, the end marker included.
        finish_reason: ``eos``, ``length``, ``stop`` (a stop string) or ``interrupted``.
        stats: figures.
        sampling_rate: of the waveform.
    """

    text: str
    waveform: Waveform | None
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    sampling_rate: int = SAMPLING_RATE


Event = TextPiece | SpeechPiece | Answer
Events = Generator[Event, None, None]
"""Pieces, and the answer last."""


def drain(
    events: Events, on_text: Callable[[str], object] | None, on_speech: Callable[[Waveform], object] | None
) -> Answer:
    """Runs to the answer; Ctrl-C in a callback counts as Ctrl-C while the answer is made."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            event = next(events) if interrupt is None else events.throw(interrupt)
            interrupt = None
            if isinstance(event, Answer):
                return event
            if isinstance(event, TextPiece) and on_text is not None:
                on_text(event.text)
            if isinstance(event, SpeechPiece) and on_speech is not None:
                on_speech(event.waveform)
        except KeyboardInterrupt as error:
            if error is interrupt:
                # It came where no answer was under way.
                raise
            interrupt = error
