"""Small pictures, sounds and videos made on the fly, so that a load test needs no files; every number gives other bytes."""

from __future__ import annotations

import base64
import io
import math
import random
import struct
import wave
import zlib
from typing import Final

SOUND_RATE_HZ: Final = 16_000
VIDEO_RATE_HZ: Final = 4
KEY_FRAME: Final = 0x10
JPEG_SIZE: Final = (96, 64)
JPEG_TABLE: Final = b"\xff\xdb\x00C\x00"
"""Before the quantization table of brightness, whose first entry is the step of a block's mean."""
JPEG: Final = base64.b64decode(
    b"/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1x"
    b"eXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAAR"
    b"CABAAGADASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAb/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFQEBAQAAAAAAAAAAAAAAAAAA"
    b"AAT/xAAWEQEBAQAAAAAAAAAAAAAAAAAABEH/2gAMAwEAAhEDEQA/AI8AAAAAAAAAAAAABXJFXJaMWyaAJVgkVckVU+o68AFSIAAAAVyRVyWj"
    b"FsmgCVYJFXJFVPqOvABUiAAAAAAAAAAAAAAf/9k="
)
"""A square on dark ground, made for this file."""
WORDS: Final = (
    "river", "window", "copper", "seven", "garden", "slowly", "paper", "bright", "under", "music", "stone", "after",
    "letter", "cold", "yellow", "engine", "quiet", "morning", "thread", "island", "carry", "open", "winter", "round",
)  # fmt: skip


def text_sample(words: int, seed: int) -> str:
    """A line of `words` words that no other seed gives, so that no prefix cache helps."""
    draw = random.Random(seed)
    return " ".join([f"note {seed}:", *(draw.choice(WORDS) for _ in range(words))])


def picture_sample(seed: int, width: int = 96, height: int = 64) -> bytes:
    """A PNG, RGB, of a coloured slope with a square in it."""
    draw = random.Random(seed)
    base, step = [draw.randrange(64, 192) for _ in range(3)], [draw.randrange(1, 3) for _ in range(3)]
    left, top = draw.randrange(width // 2), draw.randrange(height // 2)
    rows = bytearray()
    for y in range(height):
        rows.append(0)
        for x in range(width):
            inside = left <= x < left + width // 3 and top <= y < top + height // 3
            rows += bytes(255 - value if inside else (value + x * slope + y) % 256 for value, slope in zip(base, step, strict=True))  # fmt: skip
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(rows), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def sound_sample(seed: int, seconds: float = 1.0) -> bytes:
    """A WAV file, 16 kHz, mono, 16 bits: two tones."""
    draw = random.Random(seed)
    first, second = draw.uniform(200, 500), draw.uniform(600, 1200)
    count = int(SOUND_RATE_HZ * seconds)
    turn = 2 * math.pi / SOUND_RATE_HZ
    values = (int(9000 * math.sin(first * turn * i) + 6000 * math.sin(second * turn * i)) for i in range(count))
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SOUND_RATE_HZ)
        file.writeframes(struct.pack(f"<{count}h", *values))
    return out.getvalue()


def video_sample(seed: int, seconds: float = 1.0) -> bytes:
    """An AVI file of 96 x 64 pictures, motion JPEG, 4 a second: a square on dark ground whose brightness changes.

    It needs no encoder: the pictures are one JPEG whose quantization step of the mean is drawn for each. (Pictures
    that are not compressed would need nothing at all, but OpenCV 5.0, with which vLLM reads videos, crashes on them.)
    """
    draw = random.Random(seed)
    step = JPEG.index(JPEG_TABLE) + len(JPEG_TABLE)
    count = max(2, round(VIDEO_RATE_HZ * seconds))
    frames = [JPEG[:step] + bytes([draw.randrange(6, 30)]) + JPEG[step + 1 :] for _ in range(count)]
    width, height = JPEG_SIZE
    # AVIMAINHEADER, AVISTREAMHEADER and BITMAPINFOHEADER, as Microsoft's "AVI RIFF File Reference" lays them out.
    main = struct.pack("<14I", 10**6 // VIDEO_RATE_HZ, 0, 0, 0, count, 0, 1, len(JPEG), width, height, 0, 0, 0, 0)
    stream = struct.pack("<4s4sIHHIIIIIIII4H", b"vids", b"MJPG", 0, 0, 0, 0, 1, VIDEO_RATE_HZ, 0, count, len(JPEG), 0, 0, 0, 0, width, height)  # fmt: skip
    picture = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", 3 * width * height, 0, 0, 0, 0)
    streams = _list(b"strl", _riff(b"strh", stream) + _riff(b"strf", picture))
    header = _list(b"hdrl", _riff(b"avih", main) + streams)
    chunks = [_riff(b"00dc", frame) for frame in frames]
    starts = range(4, 4 + count * len(chunks[0]), len(chunks[0]))
    index = b"".join(struct.pack("<4sIII", b"00dc", KEY_FRAME, start, len(JPEG)) for start in starts)
    return _riff(b"RIFF", b"AVI " + header + _list(b"movi", b"".join(chunks)) + _riff(b"idx1", index))


def _riff(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _list(name: bytes, data: bytes) -> bytes:
    return _riff(b"LIST", name + data)
