"""A client of OpenAI-compatible servers that notes when every piece of an answer arrives. Standard library only."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import json
import ssl
import time
import wave
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from omnifp4.errors import OmniFP4Error

SPEECH_RATE_HZ: Final = 24_000
"""Of ``pcm16`` sound without a header, as OpenAI defines it and as Qwen3-Omni makes it."""
ANSWER_LIMIT_BYTES: Final = 512 << 20
"""A server that sends more in one answer is broken."""
ERROR_TEXT_LIMIT: Final = 300


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is.

    Attributes:
        base: path before ``/v1``, mostly empty.
        key: sent as a bearer token; empty: none.
        timeout_s: the longest silence.
    """

    scheme: str
    host: str
    port: int
    base: str = ""
    key: str = ""
    timeout_s: float = 300.0

    @property
    def url(self) -> str:
        """Without the key."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.base}"

    def connect(self, timeout_s: float | None = None) -> http.client.HTTPConnection:
        """A new connection, not opened yet."""
        seconds = self.timeout_s if timeout_s is None else timeout_s
        if self.scheme == "https":
            return http.client.HTTPSConnection(
                self.host, self.port, timeout=seconds, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=seconds)

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        shared = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
        return {**shared, "Authorization": f"Bearer {self.key}"} if self.key else shared


def parse_server(url: str, *, key: str = "", timeout_s: float = 300.0) -> Server:
    """Reads ``http://host:port``, with or without ``/v1`` at the end.

    Raises:
        OmniFP4Error: it is no http or https URL with a host.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise OmniFP4Error(f"server {url[:80]!r} is not a URL", hint="such as http://127.0.0.1:8000") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OmniFP4Error(f"server {url[:80]!r} is not an http or https URL", hint="such as http://127.0.0.1:8000")
    base = parts.path.rstrip("/").removesuffix("/v1")
    return Server(parts.scheme, parts.hostname, port, base, key or parts.password or "", timeout_s)


@dataclass(slots=True)
class Answer:
    """One request as it went; times are `time.perf_counter` seconds.

    Attributes:
        status: of HTTP; 0 if there was none.
        error: what went wrong, in few words; empty if all is well.
        first_s: arrival of the first token; None if none came.
        last_token_s: arrival of the last one.
        end_s: end of the answer.
        tokens: of the answer, by the server's count, or else the number of pieces of text.
        tokens_counted: ``usage`` or ``pieces``.
        pieces: pieces of text that arrived.
        sound_bytes: of 16-bit samples, without headers.
        sound_rate_hz: samples a second.
    """

    sent_s: float
    status: int = 0
    error: str = ""
    first_s: float | None = None
    last_token_s: float | None = None
    first_sound_s: float | None = None
    last_sound_s: float | None = None
    end_s: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    tokens_counted: str = "pieces"
    pieces: int = 0
    text: str = ""
    reason: str = ""
    sound_bytes: int = 0
    sound_rate_hz: int = SPEECH_RATE_HZ
    streamed: bool = False
    _opened: bool = field(default=False, repr=False)

    @property
    def sound_seconds(self) -> float:
        """Length of the sound, mono and 16 bits."""
        return self.sound_bytes / 2 / self.sound_rate_hz

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None for fewer than two tokens or an answer that came at once."""
        if self.first_s is None or self.last_token_s is None or self.tokens < 2 or not self.streamed:
            return None
        return (self.last_token_s - self.first_s) / (self.tokens - 1)

    @property
    def speech_rtf(self) -> float | None:
        """Seconds from sending to the last sound, over the seconds of sound."""
        if self.last_sound_s is None or not self.sound_bytes:
            return None
        return (self.last_sound_s - self.sent_s) / self.sound_seconds


@contextmanager
def _opened(server: Server, timeout_s: float | None = None) -> Iterator[http.client.HTTPConnection]:
    connection = server.connect(timeout_s)
    try:
        yield connection
    finally:
        connection.close()


def get_json(server: Server, path: str, *, timeout_s: float = 10.0) -> tuple[int, Any]:
    """Status and JSON of a GET; None where the body is not JSON. Raises OSError or http.client.HTTPException."""
    with _opened(server, timeout_s) as connection:
        connection.request("GET", server.base + path, headers=server.headers)
        response = connection.getresponse()
        body = response.read(ANSWER_LIMIT_BYTES)
    try:
        return response.status, json.loads(body)
    except ValueError:
        return response.status, None


def is_healthy(server: Server, *, timeout_s: float = 5.0) -> bool:
    """Whether ``/health`` answers 200."""
    try:
        with _opened(server, timeout_s) as connection:
            connection.request("GET", server.base + "/health", headers=server.headers)
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def find_model(server: Server) -> tuple[str, str]:
    """The first model that the server lists, and what the server is, such as ``vllm 0.26.0``.

    Raises:
        OmniFP4Error: nothing answers there, or it lists no model.
    """
    try:
        status, listed = get_json(server, "/v1/models")
        version_status, told = get_json(server, "/version")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise OmniFP4Error(
            f"no server answers at {server.url}: {reason}", hint="start one: omnifp4 serve MODEL"
        ) from error
    if status in (401, 403):
        raise OmniFP4Error(f"{server.url} wants an API key (status {status})", hint="give --api-key")
    models = listed.get("data") if isinstance(listed, dict) else None
    first = models[0] if isinstance(models, list) and models else None
    if status != 200 or not isinstance(first, dict) or not isinstance(first.get("id"), str):
        raise OmniFP4Error(f"{server.url}/v1/models lists no model (status {status})", hint="is it OpenAI-compatible?")
    version = told.get("version", "") if version_status == 200 and isinstance(told, dict) else ""
    return first["id"], f"{first.get('owned_by') or ''} {version}".strip()


def ask(server: Server, body: Mapping[str, Any]) -> Answer:
    """Sends one chat request and reads its whole answer, streamed or not; what goes wrong stands in `Answer.error`."""
    data = json.dumps(body).encode()
    answer = Answer(sent_s=time.perf_counter())
    try:
        with _opened(server) as connection:
            connection.request("POST", server.base + "/v1/chat/completions", body=data, headers=server.headers)
            _read_answer(connection.getresponse(), answer)
    except TimeoutError:
        answer.error = f"silent for {server.timeout_s:.0f} s"
    except (OSError, http.client.HTTPException) as error:
        answer.error = f"{type(error).__name__}: {error}".rstrip(": ")
    answer.end_s = time.perf_counter()
    if not answer.error and not answer.pieces and not answer.tokens and not answer.sound_bytes:
        answer.error = "an empty answer"
    return answer


def _read_answer(response: http.client.HTTPResponse, answer: Answer) -> None:
    answer.status = response.status
    if response.status != 200:
        answer.error = f"status {response.status}: {_error_text(response.read(1 << 16))}".rstrip(": ")
    elif "text/event-stream" in (response.getheader("Content-Type") or ""):
        answer.streamed = True
        if not _read_events(response, answer) and not answer.error:
            answer.error = "the stream broke off before [DONE]"
    else:
        _read_whole(response.read(ANSWER_LIMIT_BYTES), answer)


def _error_text(body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    if isinstance(told, dict):
        inner = told.get("error", told.get("detail", told))
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    return " ".join(text.split())[:ERROR_TEXT_LIMIT]


def _read_events(response: http.client.HTTPResponse, answer: Answer) -> bool:
    """Whether the stream came to its proper end."""
    size = 0
    while line := response.readline(ANSWER_LIMIT_BYTES):
        size += len(line)
        if size > ANSWER_LIMIT_BYTES:
            answer.error = "the answer is too large"
            return False
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return True
        try:
            event = json.loads(data)
        except ValueError:
            answer.error = "an event that is no JSON"
            return False
        if isinstance(event, dict):
            _take_event(event, answer, time.perf_counter())
        if answer.error:
            return False
    return False


def _take_event(event: Mapping[str, Any], answer: Answer, now: float) -> None:
    if event.get("error"):
        answer.error = f"error in the stream: {_error_text(json.dumps(event).encode())}"
        return
    _take_usage(event.get("usage"), answer)
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        answer.reason = choice.get("finish_reason") or answer.reason
        content, sound = delta.get("content"), delta.get("audio")
        if event.get("modality") == "audio":
            # vLLM-Omni sends sound as content, and says so.
            sound, content = {"data": content}, None
        if isinstance(sound, dict) and sound.get("data"):
            _take_sound(str(sound["data"]), answer, now)
        if isinstance(sound, dict) and sound.get("transcript"):
            content = sound["transcript"]
        # The first event of a stream names the role and has no text: it is no token, though it has content "".
        text = content or delta.get("reasoning_content") or delta.get("reasoning")
        if text or (content == "" and answer._opened and not choice.get("finish_reason")):
            answer.pieces += 1
            answer.text += text or ""
            answer.first_s = now if answer.first_s is None else answer.first_s
            answer.last_token_s = now
            if answer.tokens_counted == "pieces":
                answer.tokens = answer.pieces
        answer._opened = True


def _take_usage(usage: Any, answer: Answer) -> None:
    if not isinstance(usage, dict):
        return
    tokens, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens")
    details = usage.get("completion_tokens_details")
    sound = details.get("audio_tokens") if isinstance(details, dict) else None
    if isinstance(tokens, int) and isinstance(sound, int):
        # OpenAI counts frames of sound among them; here they are tokens of text.
        tokens -= sound
    # vLLM-Omni reports 0 with every piece of sound.
    if isinstance(tokens, int) and tokens > 0:
        answer.tokens, answer.tokens_counted = tokens, "usage"
    if isinstance(prompt, int):
        answer.prompt_tokens = max(answer.prompt_tokens, prompt)


def _take_sound(coded: str, answer: Answer, now: float) -> None:
    try:
        data = base64.b64decode(coded)
    except (binascii.Error, ValueError):
        answer.error = "sound that is no base64"
        return
    if data.startswith(b"RIFF"):
        try:
            with wave.open(io.BytesIO(data)) as file:
                answer.sound_rate_hz = file.getframerate()
                # A stream's header may not know the length: what follows it counts.
                data = file.readframes(file.getnframes())
        except (wave.Error, EOFError):
            answer.error = "sound that is no WAV"
            return
    answer.sound_bytes += len(data)
    answer.first_sound_s = now if answer.first_sound_s is None else answer.first_sound_s
    answer.last_sound_s = now


def _read_whole(body: bytes, answer: Answer) -> None:
    now = time.perf_counter()
    try:
        told = json.loads(body)
    except ValueError:
        answer.error = "an answer that is no JSON"
        return
    if not isinstance(told, dict) or told.get("error"):
        answer.error = f"error: {_error_text(body)}"
        return
    _take_usage(told.get("usage"), answer)
    for choice in told.get("choices") or ():
        message = choice.get("message") or {}
        answer.reason = choice.get("finish_reason") or answer.reason
        sound = message.get("audio")
        if isinstance(sound, dict) and sound.get("data"):
            _take_sound(str(sound["data"]), answer, now)
        text = message.get("content") or (sound.get("transcript") if isinstance(sound, dict) else None)
        if text:
            answer.text += str(text)
            answer.pieces += 1
            answer.first_s = answer.last_token_s = now
            if answer.tokens_counted == "pieces":
                answer.tokens = answer.pieces
