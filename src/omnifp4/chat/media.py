"""Media in normalised messages become decoded media, once, under one set of rules."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnifp4.chat.errors import MediaError
from omnifp4.chat.images import decode_image, image_from_value
from omnifp4.chat.messages import Message, Part
from omnifp4.chat.sound import TooLong, audio_from_array, decode_audio
from omnifp4.chat.sources import Reach, fetch
from omnifp4.chat.video import Video, VideoLimits, decode_video, video_from_frames


@dataclass(frozen=True, slots=True)
class MediaRules:
    """What media may be and where they may come from.

    Attributes:
        allow_files: local files: True, False, or the only folder they may lie in.
        allow_urls: web addresses: False, True, or the only host names.
        allow_private_hosts: allowed web addresses may lead to private networks and to this machine.
        max_bytes: the most that a data URL, bytes or a web address may hold.
        max_image_pixels: larger images are refused before they are decoded.
        max_audio_seconds: 40 minutes, the longest input the released model was made for.
        max_video_seconds: longer videos do not fit its context with their sound.
        max_video_tokens: frames of long videos are scaled down to stay within.
        max_decode_seconds: of computing, that one sound, or the frames of one video, may take.
        long_media: refuse audio and video above these lengths, or use their beginning and say so.
    """

    allow_files: bool | Path = True
    allow_urls: bool | Collection[str] = False
    allow_private_hosts: bool = True
    max_bytes: int = 256_000_000
    max_image_pixels: int = 89_000_000
    max_audio_seconds: float = 2400.0
    max_video_seconds: float = 600.0
    max_video_tokens: int = 24_000
    max_decode_seconds: float = 600.0
    long_media: TooLong = "refuse"

    def __post_init__(self) -> None:
        if self.long_media not in ("refuse", "trim"):
            raise MediaError(f"long_media is {self.long_media!r}", hint="allowed: refuse, trim")

    @property
    def reach(self) -> Reach:
        return Reach(self.allow_files, self.allow_urls, self.max_bytes, private=self.allow_private_hosts)

    @property
    def video(self) -> VideoLimits:
        return VideoLimits(
            self.max_video_seconds,
            self.max_image_pixels,
            self.max_video_tokens,
            self.long_media,
            self.max_decode_seconds,
        )


def load_media(messages: Sequence[Message], rules: MediaRules) -> tuple[list[Message], tuple[str, ...]]:
    """Replaces the sources in normalised messages by decoded media.

    Args:
        messages: from `normalise`; parts that are decoded already stay as they are.
        rules: limits.

    Returns:
        New messages: images as ``PIL.Image``, audio as float32 at 16 kHz, videos as `Video`; and notes on what was cut.

    Raises:
        MediaError: naming message and part.
    """
    notes: list[str] = []
    result = []
    for number, message in enumerate(messages):
        parts = []
        for place, part in enumerate(message["content"]):
            where = f"message {number} ({message['role']}), part {place}" if len(messages) > 1 else part["type"]
            loaded, note = _load(part, rules, where)
            parts.append(loaded)
            if note:
                notes.append(note)
        result.append({"role": message["role"], "content": parts})
    return result, tuple(notes)


def _load(part: Part, rules: MediaRules, where: str) -> tuple[Part, str]:
    kind = part["type"]
    if kind == "text" or part.get("decoded"):
        return part, ""
    value = part[kind]
    encoded = None
    if isinstance(value, str | os.PathLike | bytes | bytearray | memoryview):
        encoded = fetch(value if isinstance(value, str | os.PathLike) else bytes(value), kind, rules.reach, where)
    note = ""
    media: Any
    if kind == "image":
        limit = rules.max_image_pixels
        media = decode_image(encoded, limit, where) if encoded else image_from_value(value, limit, where)
    elif kind == "audio":
        limits = (rules.max_audio_seconds, rules.long_media, where)
        if encoded:
            media, note = decode_audio(encoded, *limits, rules.max_decode_seconds)
        else:
            media, note = audio_from_array(value, part.get("sampling_rate"), *limits)
    elif encoded:
        media, note = decode_video(encoded, bool(part.get("sound", True)), rules.video, where)
    else:
        media = value if isinstance(value, Video) else video_from_frames(value, rules.video, where)
    return {"type": kind, kind: media, "decoded": True, "name": encoded.name if encoded else kind}, note
