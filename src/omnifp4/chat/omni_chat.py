"""A conversation with an omni model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from omnifp4.chat.answer import Answer, Events, SpeechPiece, TextPiece, Waveform, drain
from omnifp4.chat.errors import ChatError
from omnifp4.chat.generation import Options, TextRun, eos_tokens, sampling_of
from omnifp4.chat.inputs import ContextRule, ModelInputs, fit_context, prompt_text, special_tokens
from omnifp4.chat.loading import open_model
from omnifp4.chat.media import MediaRules, load_media
from omnifp4.chat.messages import Message, check_last, normalise, user_message
from omnifp4.chat.meter import Meter
from omnifp4.chat.speech import Script, choose_speaker, speak, speakers
from omnifp4.decoding.choosing import shared_engine
from omnifp4.decoding.engine import Engine


class OmniChat:
    """Talks with a model over several turns, in text, images, audio, video and speech.

    A question that cannot be asked changes nothing: the conversation goes on as if it had not been tried. An answer
    that is interrupted stays in the conversation as far as it was given; without any text, the question goes too.

    Attributes:
        model: the loaded model.
        processor: its processor.
        history: messages so far, media decoded; the system message is not among them.
        system: the system message, or None.
        engine: what makes the text.
        context_tokens: the most tokens of prompt and answer.
    """

    def __init__(
        self,
        model: Any,
        *,
        processor: Any = None,
        device: str | None = None,
        speech: bool = True,
        system: str | None = None,
        rules: MediaRules | None = None,
        context: ContextRule = "trim",
        context_tokens: int | None = None,
        engine: str | Engine = "auto",
        **options: Any,
    ) -> None:
        """Opens a conversation.

        Args:
            model: a folder, a Hub id, or a loaded model.
            processor: its processor; None reads it from where the model came from.
            device: where to load; unused for a loaded model.
            speech: False leaves the talker out, and its memory.
            system: the system message.
            rules: limits of media; None takes `MediaRules()`, which reads local files and data URLs.
            context: leave the oldest turns out when the conversation grows too long, or refuse.
            context_tokens: limit of prompt and answer; None takes the engine's.
            engine: what makes the text: `auto`, a name that `choose_engine` takes, or one that it made. By name, all
                conversations on a model share one.
            **options: defaults of every answer, see `Options`.
        """
        if context not in ("trim", "refuse"):
            raise ChatError(f"context is {context!r}", hint="allowed: trim, refuse")
        self.options = Options().changed(**options)
        self.model, self.processor = open_model(model, processor, device=device, speech=speech)
        self.speech = speech and bool(getattr(self.model, "has_talker", hasattr(self.model, "talker")))
        self.rules = rules if rules is not None else MediaRules()
        self.context: ContextRule = context
        most = self.model.config.thinker_config.text_config.max_position_embeddings
        wanted = min(context_tokens, most) if context_tokens else None
        self.engine = shared_engine(self.model, engine, context_tokens=wanted) if isinstance(engine, str) else engine
        self.context_tokens = min(wanted or most, self.engine.context_tokens)
        self._markers = special_tokens(self.processor)
        self.history: list[Message] = []
        self.system = system
        self._system_message()

    @property
    def speakers(self) -> tuple[str, ...]:
        """Voices of the model."""
        return speakers(self.model) if self.speech else ()

    @property
    def device(self) -> Any:
        """Where the model's inputs go."""
        return self.model.thinker.get_input_embeddings().weight.device

    def reset(self) -> None:
        """Forgets all turns; the system message stays."""
        self.history = []

    def prompt(self) -> str:
        """The conversation so far as the checkpoint's template writes it, ready for the next answer."""
        return prompt_text(self.processor, [*self._system_message(), *self.history])

    def ask(
        self,
        text: Any = None,
        *,
        images: Any = (),
        audios: Any = (),
        videos: Any = (),
        speak: bool | str = False,
        on_text: Callable[[str], object] | None = None,
        on_speech: Callable[[Waveform], object] | None = None,
        **options: Any,
    ) -> Answer:
        """Asks and waits for the answer.

        Ctrl-C ends the answer, not the program: what there is comes back, with ``finish_reason`` ``interrupted``.

        Args:
            text: the question; a list of parts is one too.
            images: one or several: path, data URL, bytes, array, ``PIL.Image``.
            audios: one or several: path, data URL, bytes, samples at 16 kHz, or ``(samples, sampling_rate)``.
            videos: one or several: path, data URL, bytes, frames at 2 a second.
            speak: True or a speaker's name to hear the answer too.
            on_text: called with each piece of text.
            on_speech: called with each piece of the waveform, 24 kHz.
            **options: of this answer, see `Options`.

        Raises:
            OmniFP4Error: one line that says what is wrong; the conversation is as before.
        """
        message = user_message(text, images=images, audios=audios, videos=videos, markers=self._markers)
        return drain(self._turn(message, speak, on_speech is not None, options), on_text, on_speech)

    def stream(
        self,
        text: Any = None,
        *,
        images: Any = (),
        audios: Any = (),
        videos: Any = (),
        speak: bool | str = False,
        **options: Any,
    ) -> Events:
        """As `ask`, but gives each `TextPiece` and `SpeechPiece` as it is made, and the `Answer` last.

        Leaving the loop early is an interruption.
        """
        message = user_message(text, images=images, audios=audios, videos=videos, markers=self._markers)
        return self._turn(message, speak, True, options)

    def complete(
        self,
        messages: Any,
        *,
        speak: bool | str = False,
        on_text: Callable[[str], object] | None = None,
        on_speech: Callable[[Waveform], object] | None = None,
        **options: Any,
    ) -> Answer:
        """Answers a whole conversation, in any form that `normalise` takes, and leaves this one's history alone."""
        return drain(self._completion(messages, speak, on_speech is not None, options), on_text, on_speech)

    def stream_complete(self, messages: Any, *, speak: bool | str = False, **options: Any) -> Events:
        """As `complete`, in pieces."""
        return self._completion(messages, speak, True, options)

    def read(self, messages: Any) -> tuple[list[Message], tuple[str, ...]]:
        """Normalises messages, puts the system message before them where they have none, and reads their media."""
        normal = normalise(messages, markers=self._markers)
        check_last(normal)
        if normal[0]["role"] != "system":
            normal = [*self._system_message(), *normal]
        return load_media(normal, self.rules)

    def start_text(
        self, messages: Sequence[Message], options: Options, *, keep_states: bool
    ) -> tuple[ModelInputs, TextRun]:
        """Inputs within the context, and the run that makes the text; messages come from `read`."""
        inputs = fit_context(
            self.model,
            self.processor,
            messages,
            device=self.device,
            limit=self.context_tokens,
            new_tokens=options.max_new_tokens,
            rule=self.context,
        )
        sampling = sampling_of(options, getattr(self.model, "generation_config", None))
        eos = eos_tokens(self.model)
        tokenizer = self.processor.tokenizer
        return inputs, TextRun(self.engine, inputs, tokenizer, sampling, eos, options, keep_states=keep_states)

    def speaker(self, wanted: bool | str) -> str | None:
        """The speaker's name, or None where no speech is wanted.

        Raises:
            ChatError: the talker was left out, or nobody has that name.
        """
        if wanted is False or wanted is None:
            return None
        if not self.speech:
            raise ChatError(
                "this model was loaded without its talker and cannot speak", hint="load it with speech=True"
            )
        return choose_speaker(self.model, wanted)

    def script(self, inputs: ModelInputs, run: TextRun, speaker: str) -> Script:
        """What the talker is to say of a text that is done."""
        eos = self.model.config.im_end_token_id
        ends = eos_tokens(self.model)
        tokens = [token for token in run.tokens if token not in ends]
        if run.finish_reason == "stop":
            tokens = self.processor.tokenizer(run.text)["input_ids"]
        return Script(inputs, run.states, tuple(tokens) if run.text.strip() else (), eos, speaker)

    def _completion(self, messages: Any, wanted: bool | str, chunks: bool, changes: dict[str, Any]) -> Events:
        began = time.perf_counter()
        options = self.options.changed(**changes)
        self.speaker(wanted)
        loaded, notes = self.read(messages)
        return self._answer(loaded, wanted, chunks, options, notes, began, lambda text, whole: None)

    def _turn(self, message: Message, wanted: bool | str, chunks: bool, changes: dict[str, Any]) -> Events:
        """Checks and reads at once, so that what is wrong is known before the first piece is asked for."""
        began = time.perf_counter()
        options = self.options.changed(**changes)
        self.speaker(wanted)
        (loaded,), notes = load_media([message], self.rules)
        before = list(self.history)

        def keep(text: str, whole: bool) -> None:
            if text or whole:
                answer = {"role": "assistant", "content": [{"type": "text", "text": self.defused(text)}]}
                self.history = [*before, loaded, answer]

        conversation = [*self._system_message(), *before, loaded]
        return self._answer(conversation, wanted, chunks, options, notes, began, keep)

    def _answer(
        self,
        messages: Sequence[Message],
        wanted: bool | str,
        chunks: bool,
        options: Options,
        notes: tuple[str, ...],
        began: float,
        keep: Callable[[str, bool], None],
    ) -> Events:
        """Makes one answer. `keep` takes its text into the history, and whether that is all of it."""
        speaker = self.speaker(wanted)
        meter = Meter(self.device, began)
        pieces: list[Waveform] = []
        inputs = run = None
        kept = cut = False
        try:
            with meter.out_of_memory():
                try:
                    inputs, run = self.start_text(messages, options, keep_states=speaker is not None)
                    while run.finish_reason is None:
                        if piece := run.advance():
                            yield TextPiece(piece)
                    if speaker is not None:
                        meter.speech_begins()
                        script = self.script(inputs, run, speaker)
                        with closing(speak(self.model, script, options, chunks=chunks)) as spoken:
                            for waveform in spoken:
                                pieces.append(waveform)
                                yield SpeechPiece(waveform)
                except KeyboardInterrupt:
                    cut = True
                    if run is not None and (piece := run.interrupt()):
                        yield TextPiece(piece)
            if run is not None:
                keep(run.text, run.finish_reason != "interrupted")
            kept = True
            yield meter.answer(inputs, run, np.concatenate(pieces) if pieces else None, notes, cut=cut)
        except GeneratorExit:
            # The listener left: what was given out was heard.
            if run is not None and not kept:
                keep(run.text, run.finish_reason is not None)
            raise

    def defused(self, text: str) -> str:
        """A marker that the model spelled in letters must not become one when it is read again."""
        for marker in self._markers:
            if marker in text:
                text = text.replace(marker, marker.replace("<", "< ", 1))
        return text

    def _system_message(self) -> list[Message]:
        if self.system is None:
            return []
        message = {"role": "system", "content": self.system}
        return normalise([message, {"role": "user", "content": "-"}], markers=self._markers)[:1]
