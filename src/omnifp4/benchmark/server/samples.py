"""Small pictures, sounds and videos made on the fly, so that a load test needs no files; every number gives other bytes."""

from __future__ import annotations

import importlib.util
import io
import math
import random
import struct
import wave
import zlib
from typing import Final

SOUND_RATE_HZ: Final = 16_000
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


def can_make_video() -> bool:
    """Whether PyAV and numpy are here to encode one."""
    return importlib.util.find_spec("av") is not None


def video_sample(seed: int, seconds: float = 1.0, width: int = 96, height: int = 64) -> bytes:
    """An MP4 of a moving square at 4 frames a second. Needs PyAV; see `can_make_video`."""
    import av
    import numpy as np

    draw = random.Random(seed)
    colour = [draw.randrange(128, 256) for _ in range(3)]
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(max(2, round(4 * seconds))):
            picture = np.full((height, width, 3), 32, np.uint8)
            left = 4 * number % (width - 24)
            picture[16:40, left : left + 24] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()
