"""Requests of the tests of this room: over a client, and on a bare connection."""

from __future__ import annotations

import socket
import time
from typing import Any

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}


def chat_with(url: str, kind: str = "image_url") -> dict[str, Any]:
    return {**BODY, "messages": [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}]}


def message(reply: Any) -> str:
    return str(reply.json()["error"]["message"])


def raw(port: int, *pieces: bytes, seconds: float = 10.0, pause: float = 0.0) -> tuple[bytes, float]:
    """What comes back on a bare connection until the server closes it, and after how long."""
    began = time.monotonic()
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            while piece := connection.recv(65_536):
                got += piece
        except ConnectionError:
            pass
    return got, time.monotonic() - began
