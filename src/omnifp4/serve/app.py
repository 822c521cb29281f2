"""The routes: what OpenAI's clients call, what an operator watches, and the chat page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from omnifp4.chat.answer import FinishReason, SpeechPiece, TextPiece, Waveform
from omnifp4.chat.omni_chat import OmniChat
from omnifp4.errors import OmniFP4Error
from omnifp4.serve.audio_formats import MEDIA_TYPES, encode, pcm16, wav_header
from omnifp4.serve.bodies import Bodies
from omnifp4.serve.errors import ApiError, as_api_error, internal_error
from omnifp4.serve.guard import Guard
from omnifp4.serve.job import Job, TextDone
from omnifp4.serve.listening import ClientGoneError, PiecesResponse, events_of
from omnifp4.serve.metrics import Metrics
from omnifp4.serve.preparation import Preparation, Prepared
from omnifp4.serve.replies import DONE, STILL_HERE, ChatReply, event
from omnifp4.serve.requests import STREAMED_FORMATS, ChatRequest
from omnifp4.serve.scheduler import Scheduler
from omnifp4.serve.settings import Settings
from omnifp4.serve.status import Status

PAGE_FILES: Final = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
PAGE_TYPES: Final = {"html": "text/html; charset=utf-8", "js": "text/javascript", "css": "text/css"}


@dataclass
class Service:
    """One model being served.

    Attributes:
        chat: the model with its processor.
        settings: how it is reached.
        scheduler: runs the answers.
        preparation: checks the requests.
        metrics: counts.
        status: what the page shows.
    """

    chat: OmniChat
    settings: Settings
    scheduler: Scheduler
    preparation: Preparation
    metrics: Metrics
    status: Status

    @classmethod
    def start(cls, chat: OmniChat, settings: Settings, *, most_sequences: int, folder: Path | None) -> Service:
        """Starts the threads that work on a model; `folder` is its checkpoint's, for the page."""
        metrics = Metrics()
        scheduler = Scheduler(
            chat.model, chat.engine, most_sequences=most_sequences, waiting=settings.limits.waiting, metrics=metrics
        )
        status = Status(chat, scheduler, settings, folder)
        return cls(chat, settings, scheduler, Preparation(chat, settings), metrics, status)

    def close(self) -> None:
        """Ends everything under way."""
        self.preparation.close()
        self.scheduler.close()


def create_app(service: Service) -> Any:
    """The ASGI application."""
    settings = service.settings
    bodies = Bodies(settings.limits)
    created = int(time.time())
    # The interactive documentation would load its scripts from elsewhere.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(OmniFP4Error, _our_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGoneError, _client_gone)
    app.add_exception_handler(Exception, _unknown_error)

    def model_card() -> dict[str, Any]:
        return {"id": settings.name, "object": "model", "created": created, "owned_by": "omnifp4"}

    readable = partial(app.api_route, methods=["GET", "HEAD"])

    @readable("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model_card()]})

    @readable("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != settings.name:
            raise ApiError(404, f"there is no model {name[:200]!r}", param="model", code="model_not_found")
        return JSONResponse(model_card())

    @readable("/v1/audio/voices")
    async def voices() -> Response:
        # Not OpenAI's, but where Open WebUI and others look before they offer OpenAI's own names.
        names = service.chat.speakers if service.chat.speech else ()
        return JSONResponse({"voices": [{"id": one, "name": one} for one in names]})

    @readable("/health")
    async def health() -> Response:
        alive = service.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "down"}, 200 if alive else 503)

    @readable("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @readable("/v1/omnifp4/status")
    async def status() -> Response:
        return JSONResponse(service.status.read(), headers={"cache-control": "no-store"})

    async def chat_completions(request: Request) -> Response:
        async with _counted(service.scheduler) as place:
            async with bodies.read(request.headers, request.receive) as body:
                began = time.monotonic()
                wanted, prepared = await service.preparation.chat(body, began)
            service.scheduler.submit(prepared.job)
            writer = _ChatWriter(service, wanted, prepared)
            if not wanted.stream:
                return await writer.whole(request)
            return PiecesResponse(
                writer.pieces(request), media_type="text/event-stream", on_error=_error_event, on_end=place.hand_over()
            )

    async def audio_speech(request: Request) -> Response:
        async with _counted(service.scheduler) as place:
            async with bodies.read(request.headers, request.receive) as body:
                began = time.monotonic()
                wanted, prepared = await service.preparation.speech(body, began)
            service.scheduler.submit(prepared.job)
            form = wanted.form
            media_type = MEDIA_TYPES[form]
            if form not in STREAMED_FORMATS:
                waveform = await _all_speech(prepared.job, request)
                return Response(await asyncio.to_thread(encode, waveform, form), media_type=media_type)
            return PiecesResponse(
                _speech_pieces(prepared.job, request, form),
                media_type=media_type,
                on_error=lambda _: b"",
                on_end=place.hand_over(),
            )

    # Plain routes: what FastAPI does before a function that reads its own body takes a part of the time to a first token.
    app.add_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_route("/v1/audio/speech", audio_speech, methods=["POST"])
    for path, name in PAGE_FILES.items():
        app.add_route(path, _page_file(name), methods=["GET"])

    routes = [str(getattr(route, "path", "")) for route in app.routes]
    return Guard(app, settings, service.metrics, routes)


class _Place:
    """A request that is counted; the count ends with the route, or with the response it hands the count over to."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.handed_over = False

    def hand_over(self) -> Any:
        self.handed_over = True
        return self._scheduler.release


@asynccontextmanager
async def _counted(scheduler: Scheduler) -> AsyncIterator[_Place]:
    scheduler.reserve()
    place = _Place(scheduler)
    try:
        yield place
    finally:
        if not place.handed_over:
            scheduler.release()


class _ChatWriter:
    """Writes one answer of the chat route."""

    def __init__(self, service: Service, wanted: ChatRequest, prepared: Prepared) -> None:
        self._transcripts = service.preparation.transcripts
        self._wanted = wanted
        self._job = prepared.job
        self._form = wanted.audio.format if wanted.speaks and wanted.audio is not None else None
        self._reply = ChatReply(
            service.settings.name, prepared.job.prompt_tokens, prepared.audio_tokens, spoken=self._form is not None
        )

    async def whole(self, request: Request) -> Response:
        """All of it at once."""
        text: list[str] = []
        sounds: list[Waveform] = []
        done: TextDone | None = None
        async with aclosing(events_of(self._job, request.receive)) as events:
            async for one in events:
                if isinstance(one, TextPiece):
                    text.append(one.text)
                elif isinstance(one, SpeechPiece):
                    sounds.append(one.waveform)
                elif isinstance(one, TextDone):
                    done = one
        assert done is not None
        waveform = _joined(sounds)
        audio = None if self._form is None else await asyncio.to_thread(encode, waveform, self._form)
        said = "".join(text)
        self._keep(said)
        return JSONResponse(self._reply.whole(said, done.finish_reason, done.new_tokens, audio, len(waveform)))

    async def pieces(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Server-sent events."""
        reply = self._reply
        text: list[str] = []
        samples = new_tokens = 0
        reason: FinishReason = "eos"
        # Held back until there is something to follow it: until then an error still has a status of its own.
        opening = reply.opening()
        async with aclosing(events_of(self._job, request.receive)) as events:
            async for one in events:
                if one is None:
                    piece = STILL_HERE
                elif isinstance(one, TextPiece):
                    text.append(one.text)
                    piece = reply.text(one.text)
                elif isinstance(one, SpeechPiece):
                    header = reply.sound(wav_header(None)) if not samples and self._form == "wav" else b""
                    samples += len(one.waveform)
                    piece = header + reply.sound(pcm16(one.waveform))
                else:
                    if isinstance(one, TextDone):
                        reason, new_tokens = one.finish_reason, one.new_tokens
                        self._keep("".join(text))
                    continue
                yield opening + piece
                opening = b""
        usage = b""
        if self._wanted.stream_options is not None and self._wanted.stream_options.include_usage:
            usage = reply.usage_chunk(new_tokens, samples)
        yield opening + reply.closing(reason) + usage + DONE

    def _keep(self, text: str) -> None:
        if self._form is not None:
            self._transcripts.keep(self._reply.audio_id, text)


async def _all_speech(job: Job, request: Request) -> Waveform:
    async with aclosing(events_of(job, request.receive)) as events:
        return _joined([one.waveform async for one in events if isinstance(one, SpeechPiece)])


async def _speech_pieces(job: Job, request: Request, form: str) -> AsyncGenerator[bytes, None]:
    """The header comes with the first samples, so that what goes wrong before has a status of its own."""
    begun = False
    async with aclosing(events_of(job, request.receive)) as events:
        async for one in events:
            if isinstance(one, SpeechPiece):
                yield pcm16(one.waveform) if begun or form != "wav" else wav_header(None) + pcm16(one.waveform)
                begun = True
    if not begun:
        yield wav_header(0) if form == "wav" else b""


def _joined(sounds: list[Waveform]) -> Waveform:
    return np.concatenate(sounds) if sounds else np.zeros(0, np.float32)


def _page_file(name: str) -> Any:
    content = files("omnifp4.serve").joinpath("page", name).read_bytes()
    media_type = PAGE_TYPES[name.rpartition(".")[2]]

    async def page(_: Request) -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return page


def _error_event(error: ApiError) -> bytes:
    return event(error.body)


async def _api_error(_: Request, error: Any) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _our_error(_: Request, error: Any) -> Response:
    told = as_api_error(error) or internal_error()
    return JSONResponse(told.body, told.status, told.headers)


_HTTP_ERRORS: Final = {
    404: ("there is nothing at", "not_found"),
    405: ("the method is not allowed at", "method_not_allowed"),
}


async def _http_error(request: Request, error: Any) -> Response:
    what, code = _HTTP_ERRORS.get(error.status_code, ("error at", "http_error"))
    told = ApiError(error.status_code, f"{request.method[:20]}: {what} {request.url.path[:200]}", code=code)
    return JSONResponse(told.body, told.status, dict(error.headers or {}))


async def _client_gone(_: Request, __: Any) -> Response:
    return Response(status_code=499)


async def _unknown_error(_: Request, __: Any) -> Response:
    told = internal_error()
    return JSONResponse(told.body, told.status)
