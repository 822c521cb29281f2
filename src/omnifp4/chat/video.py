"""Video through PyAV: frames at a fixed rate, scaled while they are read, and the sound track beside them.

Two frames a second is the rate of Qwen's own helper. The processor knows one rate for all videos of a conversation, so
the rate is fixed here, and a longer video gets smaller frames, never fewer a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omnifp4.chat.errors import MediaError, need
from omnifp4.chat.images import MAX_RATIO, check_size, pixels
from omnifp4.chat.sound import RATE, Samples, TooLong, audio_track
from omnifp4.chat.sources import Encoded, check_codec, open_container

FRAMES_PER_SECOND = 2.0
TOKEN_PIXELS = 32 * 32
"""Pixels of one token in one of the two frames that share it."""
MAX_FRAME_TOKENS = 768
"""The helper's cap of a frame."""


@dataclass(frozen=True)
class Video:
    """Frames ``[T, 3, H, W]`` in uint8 at `FRAMES_PER_SECOND`, T even; and the sound, if any."""

    frames: NDArray[np.uint8]
    sound: Samples | None

    @property
    def silence(self) -> Samples:
        """As many silent samples as the frames last."""
        return np.zeros(round(len(self.frames) / FRAMES_PER_SECOND * RATE), np.float32)


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """What a video may be; see `MediaRules`."""

    max_seconds: float
    max_pixels: int
    max_tokens: int
    too_long: TooLong
    max_decode_seconds: float = math.inf


def decode_video(encoded: Encoded, sound: bool, limits: VideoLimits, where: str) -> tuple[Video, str]:
    """Reads an encoded video.

    Args:
        encoded: the file.
        sound: read the sound track too, where there is one.
        limits: of length and size.
        where: for errors.

    Returns:
        The video, and a note on what was cut or an empty string.
    """
    av = need("av", "reading video")
    most = int(limits.max_seconds * FRAMES_PER_SECOND)
    try:
        with open_container(encoded) as container:
            if not container.streams.video:
                raise MediaError(f"{where}: {encoded.name} has no picture", hint="pass it as audio")
            stream = container.streams.video[0]
            check_codec(stream, encoded.name, where)
            # The header is judged here, and each frame by the decoder: a frame may be larger than the header says.
            stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
            width, height = stream.codec_context.width, stream.codec_context.height
            check_size((width, height), limits.max_pixels, where, f"a frame of {encoded.name}")
            seconds = float(container.duration or 0) / 1e6
            if limits.too_long == "refuse" and seconds > limits.max_seconds + 1:
                raise _too_long(encoded.name, seconds, limits, where)
            expected = min(most, max(2, math.ceil(seconds * FRAMES_PER_SECOND))) if seconds else most
            size = frame_size(width, height, expected, limits.max_tokens)
            chosen: list[Any] = []
            for frame in _at_rate(_in_time(container.decode(stream), encoded.name, limits, where), stream):
                if len(chosen) == most:
                    if limits.too_long == "refuse":
                        raise _too_long(encoded.name, None, limits, where)
                    break
                chosen.append(frame.reformat(width=size[0], height=size[1], format="rgb24").to_ndarray())
            cut = len(chosen) == most and seconds > limits.max_seconds
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{where}: {encoded.name} is damaged or no video: {error}") from error
    if not chosen:
        raise MediaError(f"{where}: {encoded.name} has no frames: its length is zero")
    track = audio_track(encoded, limits.max_seconds, where, limits.max_decode_seconds) if sound else None
    note = f"{where}: only the first {limits.max_seconds:g} s of {encoded.name} were read" if cut else ""
    return Video(_stacked(chosen), track), note


def video_from_frames(value: Any, limits: VideoLimits, where: str) -> Video:
    """Frames given as arrays or images: a list, or ``(frames, height, width, 3)`` (also channels first)."""
    frames = [pixels(frame, where) for frame in value]
    if not frames:
        raise MediaError(f"{where}: the video has no frames")
    if len(frames) > limits.max_seconds * FRAMES_PER_SECOND:
        raise _too_long("the video", len(frames) / FRAMES_PER_SECOND, limits, where)
    if any(frame.ndim != 3 or frame.shape != frames[0].shape for frame in frames):
        raise MediaError(f"{where}: the video's frames differ in shape, or have no colour", hint="(height, width, 3)")
    height, width = frames[0].shape[:2]
    check_size((width, height), limits.max_pixels, where, "a frame of the video")
    pil = need("PIL.Image", "reading video frames", "pillow")
    size = frame_size(width, height, len(frames), limits.max_tokens)
    return Video(_stacked([np.asarray(pil.fromarray(frame[..., :3]).resize(size)) for frame in frames]), None)


def frame_size(width: int, height: int, frames: int, max_tokens: int) -> tuple[int, int]:
    """Width and height to which frames are scaled so that the whole video stays within `max_tokens`."""
    most = min(MAX_FRAME_TOKENS, max(4, max_tokens * 2 // max(1, frames))) * TOKEN_PIXELS
    if width * height <= most:
        return width, height
    scale = math.sqrt(most / (width * height))
    wide, tall = max(1, int(width * scale)), max(1, int(height * scale))
    # Rounding down must not make it thinner than the processor takes.
    return min(wide, MAX_RATIO * tall), min(tall, MAX_RATIO * wide)


def _in_time(frames: Iterator[Any], name: str, limits: VideoLimits, where: str) -> Iterator[Any]:
    """Ends what decodes for ever: a small file can hold any number of large frames."""
    deadline = time.monotonic() + limits.max_decode_seconds
    for frame in frames:
        if time.monotonic() > deadline:
            raise MediaError(
                f"{where}: {name} takes more than {limits.max_decode_seconds:g} s to decode", hint="scale it down first"
            )
        yield frame


def _at_rate(frames: Iterator[Any], stream: Any) -> Iterator[Any]:
    """For each sampling time the frame that is on the screen then."""
    step = 1 / FRAMES_PER_SECOND
    shown: Any = None
    number = 0
    first = 0.0
    now = 0.0
    for frame in frames:
        if shown is None:
            first = frame.time or 0.0
        now = frame.time - first if frame.time is not None else now + 1 / float(stream.average_rate or 25)
        while shown is not None and number * step < now - 1e-6:
            yield shown
            number += 1
        shown = frame
    end = now + 1 / float(stream.average_rate or 25)
    while shown is not None and (number == 0 or number * step < end - 1e-6):
        yield shown
        number += 1


def _stacked(frames: list[Any]) -> NDArray[np.uint8]:
    if len(frames) % 2:
        frames = [*frames, frames[-1]]
    return np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))


def _too_long(name: str, seconds: float | None, limits: VideoLimits, where: str) -> MediaError:
    length = f"{seconds:.0f} s" if seconds is not None else f"more than {limits.max_seconds:g} s"
    return MediaError(
        f"{where}: {name} lasts {length}; the limit is {limits.max_seconds:g} s",
        hint="cut it, or set long_media='trim' to use its beginning",
    )
