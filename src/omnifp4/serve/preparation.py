"""From a request's bytes to a job: everything that can be wrong with a request is found here, before it takes a place.

Reading media takes processor time, so it happens beside the model's thread, and long media do not hold up plain text:
each has a thread and a processor of its own, because a tokenizer must not be changed and used at once. That for plain
text is only ever used.
"""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from omnifp4.chat.errors import ContextError
from omnifp4.chat.generation import Options, TextRun, eos_tokens, sampling_of
from omnifp4.chat.inputs import build_inputs, special_tokens
from omnifp4.chat.messages import Message
from omnifp4.chat.omni_chat import OmniChat
from omnifp4.chat.speech import Script
from omnifp4.serve.audio_formats import check_format
from omnifp4.serve.conversation import Transcripts, has_media, read_messages
from omnifp4.serve.errors import ApiError, bad_request
from omnifp4.serve.job import Job
from omnifp4.serve.requests import STREAMED_FORMATS, ChatRequest, SpeechRequest, VoiceId, parse
from omnifp4.serve.settings import Settings

LIGHT_BYTES: Final = 65_536
"""Bodies up to this size may be parsed, and built where they hold text alone, beside plain text."""

QUICK_BYTES: Final = 2_048
"""Bodies up to this size are worked on where they arrive: going to another thread and back would take as long."""

READ_ALOUD: Final = "Read the following text aloud, word for word:\n\n"
"""Before the text of ``/v1/audio/speech``: the talker speaks an answer, and this is the question that asks for it."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Built:
    """What a job is made of; a job itself belongs to the event loop that makes it."""

    run: TextRun
    options: Options
    script: Callable[[], Script] | None
    audio_tokens: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is right.

    Attributes:
        job: ready for the scheduler.
        audio_tokens: of the prompt.
    """

    job: Job
    audio_tokens: int


class Preparation:
    """Checks requests and builds what the model reads."""

    def __init__(self, chat: OmniChat, settings: Settings) -> None:
        self.transcripts = Transcripts()
        self._chat = chat
        self._settings = settings
        self._light_processor = copy.deepcopy(chat.processor)
        self._markers = special_tokens(chat.processor)
        self._light = ThreadPoolExecutor(1, thread_name_prefix="omnifp4-prepare-text")
        self._heavy = ThreadPoolExecutor(1, thread_name_prefix="omnifp4-prepare-media")

    def close(self) -> None:
        self._light.shutdown(cancel_futures=True)
        self._heavy.shutdown(cancel_futures=True)

    async def chat(self, body: bytes, began: float) -> tuple[ChatRequest, Prepared]:
        """A chat request and its job; `began` is the ``time.monotonic()`` of its arrival.

        Raises:
            ApiError: what is wrong with it.
            OmniFP4Error: the same, from the chat room.
        """
        long = len(body) > LIGHT_BYTES
        if len(body) <= QUICK_BYTES:
            request, messages, speaker, built = self._read_chat(body, False)
        else:
            request, messages, speaker, built = await self._run(long, self._read_chat, body, long)
        if built is None:
            built = await self._run(True, self._build_chat, request, messages, speaker, self._chat.processor)
        return request, self._prepared(built, began)

    async def speech(self, body: bytes, began: float) -> tuple[SpeechRequest, Prepared]:
        """A request for speech and its job; otherwise as `chat`."""
        long = len(body) > LIGHT_BYTES
        request, built = await self._run(long, self._read_speech, body, long)
        return request, self._prepared(built, began)

    async def _run(self, heavy: bool, work: Callable[..., Result], *arguments: Any) -> Result:
        pool = self._heavy if heavy else self._light
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)

    def _processor(self, heavy: bool) -> Any:
        """That of the thread."""
        return self._chat.processor if heavy else self._light_processor

    def _prepared(self, built: _Built, began: float) -> Prepared:
        deadline = began + self._settings.limits.request_seconds
        job = Job(built.run, built.options, built.script, built.run.prompt_tokens, began, deadline)
        return Prepared(job, built.audio_tokens)

    def _read_chat(self, body: bytes, heavy: bool) -> tuple[ChatRequest, list[Message], str | None, _Built | None]:
        """Built at once where this thread may: each change of thread costs a part of the time to the first token."""
        request = parse(body, ChatRequest, self._settings.limits.json_depth)
        self._check_model(request.model)
        messages = read_messages(
            request.messages,
            self._settings,
            self.transcripts,
            markers=self._markers,
            defused=self._chat.defused,
        )
        speaker = None
        if request.speaks:
            if request.audio is None:
                raise bad_request('audio is missing: modalities has "audio"', "audio", "missing_required_parameter")
            if request.stream and request.audio.format not in STREAMED_FORMATS:
                raise bad_request(
                    f"audio.format {request.audio.format!r} cannot be streamed (allowed: {', '.join(STREAMED_FORMATS)})",
                    "audio.format",
                    "unsupported_value",
                )
            check_format(request.audio.format)
            speaker = self._speaker(request.audio.voice, "audio.voice")
        if request.stream_options is not None and not request.stream:
            raise bad_request("stream_options is for streams: set stream", "stream_options", "invalid_value")
        if has_media(messages) and not heavy:
            return request, messages, speaker, None
        return request, messages, speaker, self._build_chat(request, messages, speaker, self._processor(heavy))

    def _read_speech(self, body: bytes, heavy: bool) -> tuple[SpeechRequest, _Built]:
        request = parse(body, SpeechRequest, self._settings.limits.json_depth)
        self._check_model(request.model)
        most = self._settings.limits.speech_characters
        if len(request.input) > most:
            raise bad_request(f"input has {len(request.input):,} characters; the limit is {most:,}", "input")
        if not request.input.strip():
            raise bad_request("input has nothing to say", "input", "invalid_value")
        check_format(request.form)
        speaker = self._speaker(request.voice, "voice")
        messages: list[dict[str, Any]] = [{"role": "user", "content": READ_ALOUD + request.input}]
        if request.instructions:
            messages.insert(0, {"role": "system", "content": request.instructions})
        checked = read_messages(
            messages, self._settings, self.transcripts, markers=self._markers, defused=self._chat.defused
        )
        return request, self._build_speech(request, checked, speaker, self._processor(heavy))

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._settings.name:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r} (allowed: {self._settings.name})",
                param="model",
                code="model_not_found",
            )

    def _speaker(self, voice: str | VoiceId, param: str) -> str:
        if not self._chat.speech:
            raise bad_request("this server was started without speech", param, "unsupported_value")
        name = voice.id if isinstance(voice, VoiceId) else voice
        known = self._chat.speakers
        if name != "default" and name.lower() not in [one.lower() for one in known]:
            raise bad_request(f"there is no voice {name[:80]!r} (allowed: {', '.join(known)})", param, "invalid_value")
        speaker = self._chat.speaker(True if name == "default" else name)
        assert speaker is not None
        return speaker

    def _build_chat(self, request: ChatRequest, messages: list[Message], speaker: str | None, processor: Any) -> _Built:
        asked = request.max_completion_tokens or request.max_tokens
        options = self._chat.options.changed(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=None if request.top_k is None else max(0, request.top_k),
            repetition_penalty=request.repetition_penalty,
            seed=_seed(request.seed),
            stop=request.stops,
            max_speech_seconds=self._settings.limits.speech_seconds,
        )
        eos = frozenset() if request.ignore_eos else eos_tokens(self._chat.model)
        run, options, audio_tokens = self._build(messages, options, asked, eos, processor, speaker is not None)
        script = None if speaker is None else partial(self._script, run, speaker)
        return _Built(run, options, script, audio_tokens)

    def _build_speech(self, request: SpeechRequest, messages: list[Message], speaker: str, processor: Any) -> _Built:
        options = self._chat.options.changed(
            temperature=0, seed=_seed(request.seed), max_speech_seconds=self._settings.limits.speech_seconds
        )
        # The one token is thrown away: what is wanted of this run are the states of its prompt.
        run, options, audio_tokens = self._build(messages, options, 1, frozenset(), processor, True)
        said = tuple(processor.tokenizer(request.input)["input_ids"])
        eos = self._chat.model.config.im_end_token_id

        def script() -> Script:
            return Script(run.inputs, run.states, said, eos, speaker)

        return _Built(run, options, script, audio_tokens)

    def _script(self, run: TextRun, speaker: str) -> Script:
        return self._chat.script(run.inputs, run, speaker)

    def _build(
        self,
        messages: list[Message],
        options: Options,
        asked: int | None,
        eos: frozenset[int],
        processor: Any,
        keep_states: bool,
    ) -> tuple[TextRun, Options, int]:
        chat, limits = self._chat, self._settings.limits
        if asked is not None and asked > limits.new_tokens:
            raise bad_request(f"max_tokens is {asked}; this server allows up to {limits.new_tokens}", "max_tokens")
        loaded, _ = chat.read(messages)
        inputs = build_inputs(chat.model, processor, loaded, device=chat.device)
        room = chat.context_tokens - inputs.prompt_tokens
        if room < (asked or 1):
            raise ContextError(
                f"the conversation has {inputs.prompt_tokens} tokens and the answer may have {asked or 1}, together "
                f"more than the context of {chat.context_tokens}"
            )
        options = options.changed(max_new_tokens=asked or min(limits.default_new_tokens, room))
        sampling = sampling_of(options, getattr(chat.model, "generation_config", None))
        run = TextRun(chat.engine, inputs, processor.tokenizer, sampling, eos, options, keep_states=keep_states)
        audio_tokens = 0
        if "input_features" in inputs.tensors:
            audio_token = chat.model.config.thinker_config.audio_token_id
            audio_tokens = int((inputs.tensors["input_ids"] == audio_token).sum())
        return run, options, audio_tokens


def _seed(seed: int | None) -> int:
    """OpenAI's seeds may be negative; without one, every answer is another."""
    return secrets.randbits(62) if seed is None else seed & (2**63 - 1)
