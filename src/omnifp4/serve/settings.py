"""What a server allows, and how much of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from omnifp4.errors import OmniFP4Error

DEFAULT_PORT: Final = 8000
DEFAULT_NEW_TOKENS: Final = 1024
CPU_SEQUENCES: Final = 8
"""Answers at once where there is no GPU."""
GPU_SEQUENCES: Final = 32


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what one client, and all together, may cost. Each is checked before the cost arises.

    Attributes:
        waiting: requests that may wait for a place beside those that have one.
        connections: open at once.
        header_bytes: of one request's headers.
        header_seconds: until the headers are complete.
        body_bytes: of one request.
        bodies_bytes: of all requests that are being read or prepared.
        body_seconds: until the body is complete.
        idle_seconds: between two requests on one connection.
        write_seconds: that a client may take nothing of what is written to it.
        request_seconds: from the complete request to the end of the answer.
        json_depth: lists and objects within each other.
        messages: in one conversation.
        media: images, sounds and videos in one conversation.
        image_pixels: of one image or frame.
        audio_seconds: of one sound.
        video_seconds: of one video.
        decode_seconds: that reading one sound or video may take.
        prompt_characters: of all text in a conversation.
        new_tokens: the most of one answer.
        default_new_tokens: where the request says nothing.
        speech_seconds: of one answer or text.
        speech_characters: of one text to be said.
    """

    waiting: int = 64
    connections: int = 512
    header_bytes: int = 32_768
    header_seconds: float = 10.0
    body_bytes: int = 64_000_000
    bodies_bytes: int = 512_000_000
    body_seconds: float = 120.0
    idle_seconds: int = 10
    write_seconds: float = 60.0
    request_seconds: float = 600.0
    json_depth: int = 32
    messages: int = 1_000
    media: int = 16
    image_pixels: int = 25_000_000
    audio_seconds: float = 1_200.0
    video_seconds: float = 120.0
    decode_seconds: float = 30.0
    prompt_characters: int = 1_000_000
    new_tokens: int = 8_192
    default_new_tokens: int = DEFAULT_NEW_TOKENS
    speech_seconds: float = 300.0
    speech_characters: int = 4_096


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server is reached and what it may reach.

    Attributes:
        name: of the model, as clients ask for it.
        host: to listen on.
        port: to listen on; 0 takes a free one.
        api_key: that clients must show; None asks for none.
        allow_hosts: names under which clients may reach a server on loopback, beside its own: those of a proxy.
        media_hosts: web servers that media may be fetched from.
        media_folder: the folder that media may be read from.
        limits: bounds.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_key: str | None = field(default=None, repr=False)
    allow_hosts: tuple[str, ...] = ()
    media_hosts: tuple[str, ...] = ()
    media_folder: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise OmniFP4Error(f"port is {self.port}", hint="allowed: 0 to 65535")
        if self.api_key is not None and not self.api_key.strip():
            raise OmniFP4Error("the API key is empty", hint="--api-key SECRET, or leave it out")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise OmniFP4Error("the API key begins or ends with white space, which no client can send")
        if self.media_folder is not None and not self.media_folder.is_dir():
            raise OmniFP4Error(f"{self.media_folder} is not a folder", hint="--allow-media-folder FOLDER")
        for option, hosts in (("--allow-media-host", self.media_hosts), ("--allow-host", self.allow_hosts)):
            for host in hosts:
                if not host or host != host.strip() or "/" in host or (":" in host and not _is_ipv6(host.strip("[]"))):
                    raise OmniFP4Error(
                        f"{option} is {host!r}, which is no host name",
                        hint=f"without scheme and port: {option} chat.example.org",
                    )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def known_hosts(self) -> frozenset[str] | None:
        """Names that a request's Host header may have; None: any.

        On loopback a foreign name means that a web page had its own name resolve to this machine.
        """
        if not self.is_loopback:
            return None
        return frozenset(
            name.lower().strip("[]") for name in ("localhost", "127.0.0.1", "::1", self.host, *self.allow_hosts)
        )


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
