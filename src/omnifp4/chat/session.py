"""Answers in steps, for frameworks that drive generation themselves: start, step, finish.

A framework that spends its effort by need (one that asks between steps whether to go on) cannot hand control to
``generate()``. Here it gets a state; each step makes a few tokens on the same cache; the result is that of one call,
token for token. Any number of states may be under way on one model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from omnifp4.chat.answer import Answer
from omnifp4.chat.errors import ChatError
from omnifp4.chat.generation import Options, TextRun
from omnifp4.chat.inputs import ModelInputs
from omnifp4.chat.meter import Meter
from omnifp4.chat.omni_chat import OmniChat
from omnifp4.chat.speech import speak


@dataclass
class SessionState:
    """An answer under way.

    Attributes:
        messages: the conversation with its media.
        text: so far; only text that no later token changes.
        new_text: what the last step added.
        tokens: made so far.
        finished: nothing is left to step.
    """

    messages: list[dict[str, Any]]
    text: str = ""
    new_text: str = ""
    tokens: int = 0
    finished: bool = False
    _inputs: ModelInputs | None = field(default=None, repr=False)
    _run: TextRun | None = field(default=None, repr=False)
    _options: Options = field(default_factory=Options, repr=False)
    _notes: tuple[str, ...] = field(default=(), repr=False)
    _speaker: str | None = field(default=None, repr=False)
    _meter: Meter | None = field(default=None, repr=False)


class StepSession:
    """Starts, steps and finishes answers of one `OmniChat`'s model; its history plays no part."""

    def __init__(self, chat: OmniChat) -> None:
        self.chat = chat

    def start(self, messages: Any, *, speak: bool | str = False, **options: Any) -> SessionState:
        """Reads a conversation; no token is made yet.

        Args:
            messages: in any form that `omnifp4.chat.messages.normalise` takes.
            speak: True or a speaker's name, for `finish` to add speech.
            **options: see `Options`.
        """
        began = time.perf_counter()
        chosen = self.chat.options.changed(**options)
        speaker = self.chat.speaker(speak)
        loaded, notes = self.chat.read(messages)
        meter = Meter(self.chat.device, began)
        with meter.out_of_memory():
            inputs, run = self.chat.start_text(loaded, chosen, keep_states=speaker is not None)
        return SessionState(
            loaded,
            _inputs=inputs,
            _run=run,
            _options=chosen,
            _notes=notes,
            _speaker=speaker,
            _meter=meter,
        )

    def step(self, state: SessionState, tokens: int = 1) -> SessionState:
        """Makes up to `tokens` tokens; the state is changed and returned. A finished state stays as it is."""
        run, meter = _under_way(state)
        if tokens < 1:
            raise ChatError(f"a step makes at least one token, not {tokens}")
        pieces = []
        with meter.out_of_memory():
            for _ in range(tokens):
                pieces.append(run.advance())
        state.new_text = "".join(pieces)
        _update(state, run)
        return state

    def finish(self, state: SessionState) -> Answer:
        """Ends the answer where it stands and says it, if that was wanted; the state is over then.

        A state that is not finished yet gives what there is, with ``finish_reason`` ``interrupted``; step until
        ``finished`` for the whole.
        """
        run, meter = _under_way(state)
        run.interrupt()
        _update(state, run)
        waveform = None
        if state._speaker is not None and state._inputs is not None:
            meter.speech_begins()
            script = self.chat.script(state._inputs, run, state._speaker)
            with meter.out_of_memory():
                pieces = list(speak(self.chat.model, script, state._options, chunks=False))
            waveform = np.concatenate(pieces) if pieces else None
        answer = meter.answer(state._inputs, run, waveform, state._notes)
        state._run = None
        return answer


def _under_way(state: SessionState) -> tuple[TextRun, Meter]:
    if state._run is None or state._meter is None:
        raise ChatError("this session is over", hint="start a new one")
    return state._run, state._meter


def _update(state: SessionState, run: TextRun) -> None:
    state.text = run.text
    state.tokens = len(run.tokens)
    state.finished = run.finish_reason is not None
