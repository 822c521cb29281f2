"""Loads a model and serves it until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvicorn

from omnifp4.chat.generation import sampling_of
from omnifp4.chat.media import MediaRules
from omnifp4.chat.omni_chat import OmniChat
from omnifp4.decoding.choosing import choose_engine
from omnifp4.decoding.engine import EngineFull, Sampling, Sequence
from omnifp4.errors import OmniFP4Error
from omnifp4.serve.app import Service, create_app
from omnifp4.serve.protocol import protocol_for
from omnifp4.serve.settings import CPU_SEQUENCES, GPU_SEQUENCES, Settings

SWITCH_SECONDS: Final = 0.0005
"""For which a thread may keep the interpreter from others."""

WARM_TOKENS: Final = 16
"""Of each answer made to warm up: one for each doubling of their number, and some more."""

GRACE_SECONDS: Final = 5
"""That answers under way have to end after Ctrl-C."""
LAST_SECONDS: Final = 3
"""After those, for telling their listeners that they end here."""


def media_rules(settings: Settings) -> MediaRules:
    """What requests may bring along and reach for."""
    limits = settings.limits
    return MediaRules(
        allow_files=settings.media_folder if settings.media_folder is not None else False,
        allow_urls=frozenset(host.lower() for host in settings.media_hosts) or False,
        allow_private_hosts=False,
        max_bytes=limits.body_bytes,
        max_image_pixels=limits.image_pixels,
        max_audio_seconds=limits.audio_seconds,
        max_video_seconds=limits.video_seconds,
        max_decode_seconds=limits.decode_seconds,
    )


def open_service(
    model: Any,
    settings: Settings,
    *,
    processor: Any = None,
    device: str | None = None,
    speech: bool = True,
    decoding: str = "auto",
    most_sequences: int | None = None,
    context_tokens: int | None = None,
    folder: Path | None = None,
) -> Service:
    """Makes a model ready for requests.

    Args:
        model: a folder, or a loaded model.
        settings: how it will be reached.
        processor: the model's; None reads it from where the model came from.
        device: to load to.
        speech: load the talker too.
        decoding: what makes the text, as `choose_engine` takes it.
        most_sequences: answers at once; None decides by the device.
        context_tokens: of one conversation with its answer.
        folder: the model's checkpoint; None takes `model` where that is a folder.

    Raises:
        OmniFP4Error: the model or an option does not fit.
    """
    from omnifp4.chat.loading import open_model

    loaded, processor = open_model(model, processor, device=device, speech=speech)
    if most_sequences is None:
        most_sequences = GPU_SEQUENCES if loaded.thinker.device.type == "cuda" else CPU_SEQUENCES
    engine = choose_engine(loaded, decoding, most_sequences=most_sequences, context_tokens=context_tokens)
    chat = OmniChat(
        loaded, processor=processor, speech=speech, rules=media_rules(settings), context="refuse", engine=engine
    )
    # Graphs are captured and kernels built before anybody waits, and while no other thread uses the device.
    chat.ask("Hello", speak=chat.speech, max_new_tokens=2, temperature=0, max_speech_seconds=0.5)
    chat.reset()
    if engine.name == "cuda-graph":
        warm_up(chat, most_sequences)
    folder = folder or (Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None)
    return Service.start(chat, settings, most_sequences=most_sequences, folder=folder)


def warm_up(chat: OmniChat, most_sequences: int) -> None:
    """Makes tokens for 1, 2, 4 … answers at once, greedy and as the checkpoint draws: an engine captures a step for each."""
    engine = chat.engine
    messages, _ = chat.read("Hello")
    inputs, _ = chat.start_text(messages, chat.options.changed(max_new_tokens=WARM_TOKENS), keep_states=False)
    own = sampling_of(chat.options, getattr(chat.model, "generation_config", None))
    for sampling in dict.fromkeys((Sampling(), own)):
        under_way: list[Sequence] = []
        try:
            while len(under_way) < most_sequences:
                for _ in range(min(max(1, len(under_way)), most_sequences - len(under_way))):
                    under_way.append(engine.start(inputs, sampling, most_tokens=WARM_TOKENS))
                engine.step(under_way)
        except EngineFull:
            pass  # so many never are under way at once
        finally:
            for sequence in under_way:
                engine.stop(sequence)


def listen(settings: Settings) -> socket.socket:
    """Takes the address, so that one that cannot be had is known before a model is loaded.

    Raises:
        OmniFP4Error: it is taken, not allowed, or none of this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        # asyncio turns the kernel's collecting of small packets off only where the protocol is named, and a token is one.
        taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((settings.host, settings.port))
    except OSError as error:
        raise OmniFP4Error(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}", hint="--port N"
        ) from error
    return taken


def settle_process() -> None:
    """Makes this process one that serves: to be called once, when everything is loaded."""
    # The thread that makes tokens comes back from the device and wants the interpreter; 5 ms are half of a step.
    sys.setswitchinterval(SWITCH_SECONDS)
    # What is there now stays. Looking through it for garbage, as Python does now and then, takes longer than ten steps.
    gc.collect()
    gc.freeze()


class _Server(uvicorn.Server):
    """Says when it can be reached, and ends answers in good order: a stream that is cut has an error as its last event."""

    def __init__(
        self, config: uvicorn.Config, service: Service, grace_seconds: float, on_start: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._grace_seconds = grace_seconds
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace_seconds, self._service.scheduler.give_up)
        await super().shutdown(sockets)


def make_server(
    service: Service, grace_seconds: float = GRACE_SECONDS, on_start: Callable[[], object] = lambda: None
) -> uvicorn.Server:
    """uvicorn with the bounds of the service's settings.

    Args:
        service: what is served.
        grace_seconds: that answers under way have when the server is told to end.
        on_start: called when connections are taken.
    """
    limits = service.settings.limits
    config = uvicorn.Config(
        create_app(service),
        http=protocol_for(limits),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level=logging.WARNING,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        h11_max_incomplete_event_size=limits.header_bytes,
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=math.ceil(grace_seconds) + LAST_SECONDS,
    )
    return _Server(config, service, grace_seconds, on_start)


def serve(model: str, settings: Settings, *, say: Callable[[str], object], **options: Any) -> None:
    """Loads and serves a model until Ctrl-C.

    Args:
        model: its folder.
        settings: how it is reached.
        say: takes lines for the operator.
        **options: as `open_service` takes them.
    """
    taken = listen(settings)
    try:
        begin = time.perf_counter()
        service = open_service(model, settings, **options)
        try:
            settle_process()

            def told() -> None:
                host, port = taken.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                engine, scheduler = service.chat.engine, service.scheduler
                taken_s = time.perf_counter() - begin
                say(f"{settings.name} is ready after {taken_s:.1f} s; engine {engine.name}: {engine.reason}")
                say(
                    f"up to {scheduler.most_sequences} answers at once, {service.chat.context_tokens} tokens of context"
                )
                if not settings.is_loopback and settings.api_key is None:
                    say("warning: everybody who reaches this machine can use the model (set --api-key)")
                say(f"chat page: http://{shown}:{port}/    OpenAI base URL: http://{shown}:{port}/v1")

            make_server(service, on_start=told).run(sockets=[taken])
        finally:
            service.close()
    finally:
        taken.close()
