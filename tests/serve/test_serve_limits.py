"""What strangers must not hold for long: memory, connections, places, time."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

import serve_media as made
from serve_requests import BODY, CHAT, chat_with, message, raw


@pytest.fixture(scope="module")
def narrow(start_server: Callable[..., Any]) -> Iterator[Any]:
    """A server with little room and no patience."""
    limits = {
        "body_bytes": 100_000,
        "bodies_bytes": 150_000,
        "body_seconds": 0.5,
        "header_seconds": 0.4,
        "idle_seconds": 1,
        "header_bytes": 8_192,
        "write_seconds": 0.5,
        "request_seconds": 1.0,
        "waiting": 1,
        "new_tokens": 20_000,
        "decode_seconds": 0.0,
    }
    with start_server(limits=limits, most_sequences=1) as server:
        yield server


def head(length: int | str = 10, *more: str) -> bytes:
    lines = [
        f"POST {CHAT} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {length}",
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_bodies_are_bounded(narrow: Any) -> None:
    with httpx.Client(base_url=narrow.url) as client:
        large = json.dumps({**BODY, "user": "x" * 100_000}).encode()
        assert client.post(CHAT, content=large, headers={"content-type": "application/json"}).status_code == 413
        chunks = (b"x" * 10_000 for _ in range(20))
        assert client.post(CHAT, content=chunks, headers={"content-type": "application/json"}).status_code == 413
    got, seconds = raw(narrow.port, head(10**12))
    assert b" 413 " in got and seconds < 8, "refused by its stated length alone, and closed"


def test_slow_bodies_and_headers_are_given_up(narrow: Any) -> None:
    got, seconds = raw(narrow.port, head(1_000), b"{", seconds=10)
    assert b" 408 " in got and seconds < 8
    for start in (b"", b"GET / HT", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: "):
        got, seconds = raw(narrow.port, start, seconds=10)
        assert got == b"" and seconds < 8
    drip = [b"GET / HTTP/1.1\r\n", *[b"x: y\r\n"] * 20]
    got, seconds = raw(narrow.port, *drip, pause=0.1, seconds=10)
    assert got == b"" and seconds < 8, "a header now and then does not win time"
    again = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    got, seconds = raw(narrow.port, again, b"GET /hea", pause=0.2, seconds=10)
    assert got.startswith(b"HTTP/1.1 200") and seconds < 8, "nor does a second request on the same connection"


def test_header_floods_are_refused(narrow: Any) -> None:
    flood = b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x-y: " + b"z" * 20_000 + b"\r\n\r\n"
    got, _ = raw(narrow.port, flood)
    assert b" 200 " not in got
    many = b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 50_000 + b"\r\n"
    got, _ = raw(narrow.port, many)
    assert b" 200 " not in got
    for nonsense in (b"\x16\x03\x01" + bytes(200), b"\r\n" * 1_000, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        got, _ = raw(narrow.port, nonsense)
        assert b" 200 " not in got
    assert httpx.get(f"{narrow.url}/health").json() == {"status": "ok"}


def test_the_queue_and_the_time_are_bounded(narrow: Any) -> None:
    """One place and one that waits: of four, two are refused at once, and two run out of time."""
    endless = {**BODY, "max_tokens": 20_000, "ignore_eos": True}
    barrier = threading.Barrier(4)

    def ask(_: int) -> Any:
        barrier.wait()
        return httpx.post(narrow.url + CHAT, json=endless, timeout=30)

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(ask, range(4)))
    assert sorted(reply.status_code for reply in replies) == [503, 503, 504, 504]
    refused = next(reply for reply in replies if reply.status_code == 503)
    assert refused.headers["retry-after"] == "1" and "most that this server takes" in message(refused)
    late = next(reply for reply in replies if reply.status_code == 504)
    assert message(late) == "the answer took more than 1 s"
    assert httpx.post(narrow.url + CHAT, json=BODY, timeout=30).status_code == 200
    streamed = httpx.post(narrow.url + CHAT, json={**endless, "stream": True}, timeout=30)
    assert '"code":"timeout"' in streamed.text and "[DONE]" not in streamed.text


def test_silent_connections_are_bounded(start_server: Callable[..., Any]) -> None:
    from omnifp4.serve.protocol import SPARE_CONNECTIONS

    with start_server(limits={"connections": 4, "header_seconds": 30.0}) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4 + SPARE_CONNECTIONS)]
        got, _ = raw(server.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert got == b"", "closed without a word"
        for one in silent[4:]:
            one.close()
        deadline = time.monotonic() + 10
        while (
            b" 503 " not in raw(server.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")[0]
        ):
            assert time.monotonic() < deadline
        for one in silent[:4]:
            one.close()
        while (
            b" 200 " not in raw(server.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")[0]
        ):
            assert time.monotonic() < deadline


def test_long_decoding_is_given_up(narrow: Any, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    reply = httpx.post(
        narrow.url + CHAT, json=chat_with(made.data_url(made.mp4(tmp_path), "video/mp4"), "video_url"), timeout=30
    )
    assert reply.status_code == 400 and "takes more than 0 s to decode" in message(reply)
    sound = {"messages": [{"role": "user", "content": [made.audio_part()]}], "max_tokens": 1}
    reply = httpx.post(narrow.url + CHAT, json=sound, timeout=30)
    assert reply.status_code == 400 and "takes more than 0 s to decode" in message(reply)


def test_clients_that_do_not_read_are_given_up(start_server: Callable[..., Any]) -> None:
    limits = {"write_seconds": 0.3, "speech_seconds": 8.0, "request_seconds": 60.0}
    with start_server(limits=limits, send_buffer=4_096) as server:
        body = json.dumps({"input": "Hello.", "voice": "Ethan", "response_format": "pcm"}).encode()
        request = (
            f"POST /v1/audio/speech HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode() + body
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(request)
            deadline = time.monotonic() + 30
            while server.service.scheduler.waiting == 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            while server.service.scheduler.waiting:
                assert time.monotonic() < deadline, "it waits for a client that reads nothing"
                time.sleep(0.02)


def test_the_end_is_told(start_server: Callable[..., Any]) -> None:
    """Streams under way have some time left, and then an error as their last event; so has an answer being spoken."""
    endless = {**BODY, "max_tokens": 8_000, "ignore_eos": True, "stream": True}
    spoken = {"input": "Hello.", "voice": "Ethan", "response_format": "wav"}
    with start_server(grace_seconds=0.3, limits={"speech_seconds": 60.0}) as server, ThreadPoolExecutor(2) as pool:
        stream = pool.submit(httpx.post, server.url + CHAT, json=endless, timeout=30)
        speech = pool.submit(httpx.post, f"{server.url}/v1/audio/speech", json=spoken, timeout=30)
        deadline = time.monotonic() + 20
        while not (server.service.scheduler.running and _speaking(server)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.server.should_exit = True
        lines = stream.result().text.split("\n\n")
        assert len(lines) > 3 and "the server is going down" in lines[-2]
        with suppress(httpx.RemoteProtocolError):  # it had begun, and is cut
            assert speech.result().status_code in (200, 503)


def _speaking(server: Any) -> bool:
    return bool(server.service.metrics.registry.get_sample_value("omnifp4_answers_speaking"))
