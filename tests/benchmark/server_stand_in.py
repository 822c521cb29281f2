"""A small OpenAI-compatible server whose answers have known times, and which can go wrong in known ways."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FIRST_S, EACH_S = 0.03, 0.01
SOUND_SECONDS = 0.5


@dataclass
class Behaviour:
    """What the server does.

    Attributes:
        mode: stream, whole (not streamed), broken (stream without an end), error-event, silent, status-500, html, empty.
        usage: send the server's own count of tokens.
        fail_every: answer 500 to each so-many-th request.
        sound: pcm (OpenAI's form), wav (vLLM-Omni's form).
    """

    mode: str = "stream"
    usage: bool = True
    fail_every: int = 0
    sound: str = "pcm"
    key: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def wav(samples: bytes) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(24_000)
        file.writeframes(samples)
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def log_message(self, format: str, *arguments: object) -> None:
        return

    def _send(self, data: bytes, status: int = 200, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        key = self.behaviour.key
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self._send(b'{"error": {"message": "no key"}}', 401)
        elif self.path == "/v1/models":
            self._send(b'{"data": [{"id": "tiny", "owned_by": "stand-in"}]}')
        elif self.path == "/version":
            self._send(b'{"version": "1.2"}')
        else:
            self._send(b"{}", 404)

    def do_POST(self) -> None:
        behaviour = self.behaviour
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with behaviour.lock:
            behaviour.bodies.append(body)
            number = len(behaviour.bodies)
            behaviour.at_once += 1
            behaviour.most_at_once = max(behaviour.most_at_once, behaviour.at_once)
        self.is_counted = True
        try:
            self._answer(behaviour, body, number)
        finally:
            self._leave(behaviour)

    def _leave(self, behaviour: Behaviour) -> None:
        """No longer at work; said before the last bytes, since the client may ask again as soon as it has them."""
        with behaviour.lock:
            behaviour.at_once -= self.is_counted
            self.is_counted = False

    def _answer(self, behaviour: Behaviour, body: dict[str, Any], number: int) -> None:
        if behaviour.mode == "status-500" or (behaviour.fail_every and number % behaviour.fail_every == 0):
            self._send(json.dumps({"error": {"message": f"request {1000000 + number} failed"}}).encode(), 500)
        elif behaviour.mode == "html":
            self._send(b"<html>", kind="text/html")
        elif behaviour.mode == "silent":
            time.sleep(1.0)
        elif behaviour.mode == "whole":
            time.sleep(FIRST_S)
            message = {"content": "a b c", "role": "assistant"}
            usage = {"completion_tokens": 3, "prompt_tokens": 5}
            self._send(
                json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()
            )
        else:
            self._stream(behaviour, body)

    def _stream(self, behaviour: Behaviour, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if behaviour.mode == "error-event":
            self._event({"error": {"message": "out of memory"}})
            return
        time.sleep(FIRST_S)
        count = 0 if behaviour.mode == "empty" else body["max_tokens"]
        for number in range(count):
            if number:
                time.sleep(EACH_S)
            self._event({"choices": [{"delta": {"content": f"w{number} "}}]})
        if behaviour.mode == "broken":
            return
        if "audio" in body["modalities"]:
            self._sound(behaviour)
        if behaviour.usage:
            frames = 40 if "audio" in body["modalities"] else 0
            details = {"completion_tokens_details": {"audio_tokens": frames}} if behaviour.sound == "pcm" else {}
            made = count + (frames if details else 0)
            self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": made, **details}})
        self._leave(behaviour)
        self.wfile.write(b": a comment\n\ndata: [DONE]\n\n")

    def _sound(self, behaviour: Behaviour) -> None:
        half = b"\1\0" * int(24_000 * SOUND_SECONDS / 2)
        for _ in range(2):
            if behaviour.sound == "wav":
                data = base64.b64encode(wav(half)).decode()
                self._event(
                    {"modality": "audio", "choices": [{"delta": {"content": data}}], "usage": {"completion_tokens": 0}}
                )
            else:
                self._event({"choices": [{"delta": {"audio": {"data": base64.b64encode(half).decode()}}}]})

    def _event(self, value: object) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\r\n\r\n")
        self.wfile.flush()


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The server's URL."""
    handler = type("Bound", (Handler,), {"behaviour": behaviour})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
