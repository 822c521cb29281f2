"""Media made on the spot: files in many formats, and damaged ones."""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omnifp4.chat.video import Video

SECOND = 16_000

STORY = (
    "Tell me a short story about a dragon.",
    "What is the dragon's name?",
    "Where does it live?",
    "Who is its friend?",
    "How does the story end?",
)
"""Five turns, each of which builds on those before."""


def tone(seconds: float = 1.0, rate: int = SECOND, hertz: float = 440.0) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def picture(width: int = 96, height: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_bytes(form: str = "PNG", mode: str = "RGB", **size: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture(**size)).convert(mode).save(file, form)
    return file.getvalue()


def wav_bytes(seconds: float = 1.0, rate: int = SECOND, form: str = "WAV") -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, tone(seconds, rate), rate, format=form)
    return file.getvalue()


def video_file(
    path: Path, seconds: float = 2.0, rate: int = 10, sound: bool = False, width: int = 64, height: int = 48
) -> Path:
    """A video whose brightness rises with time; sound is a tone at 44.1 kHz."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        track: Any = container.add_stream("aac", rate=44_100, layout="mono") if sound else None
        count = round(seconds * rate)
        for number in range(count):
            pixels = np.full((height, width, 3), 20 + 200 * number // max(1, count), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        if track is not None:
            samples = tone(seconds, 44_100)
            for start in range(0, len(samples) - 1023, 1024):
                frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 44_100, start
                container.mux(track.encode(frame))
            container.mux(track.encode())
    return path


def sound_file(path: Path, codec: str, rate: int, layout: str, seconds: float = 0.5) -> Path:
    """Sound of one channel that soundfile does not read, so that PyAV does; the name's ending is the container."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.layout = layout
        samples, channels = int(rate * seconds), len(av.AudioLayout(layout).channels)
        values = np.zeros((samples, channels), np.float32)
        values[:, 0] = 0.25
        frame = av.AudioFrame.from_ndarray(values.reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path


def sounding_video(seconds: float = 2.0, hertz: float = 440.0) -> Video:
    """Decoded noise with a tone."""
    frames = np.stack([picture(seed=number) for number in range(int(seconds * 2))]).transpose(0, 3, 1, 2)
    return Video(frames, tone(seconds, hertz=hertz))


def data_url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims, and truly unpacks to, any number of grey pixels of one row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def long_wav(seconds: int, rate: int = 8000) -> bytes:
    """A WAV whose header tells the truth about its length."""
    data = b"\x80" * (seconds * rate)
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, 1, rate, rate, 1, 8, b"data", len(data)
    )
    return header + data


def read_wav(path: Path) -> tuple[int, NDArray[np.int16]]:
    """Rate and samples of a 16-bit mono file, whose header must be right."""
    with wave.open(str(path), "rb") as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        assert path.stat().st_size == 44 + 2 * file.getnframes()
        return file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), np.int16)
