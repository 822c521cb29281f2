"""Media as clients send them."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path

import numpy as np


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int = 96, height: int = 64, seed: int = 0) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def wav(seconds: float = 1.0, hertz: float = 440.0, rate: int = 16_000) -> bytes:
    samples = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def mp4(folder: Path, seconds: float = 2.0, rate: int = 10) -> bytes:
    import av

    path = folder / "made.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(round(seconds * rate)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 + number * 5, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path.read_bytes()


def image_part(**size: int) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_url(png(**size), "image/png")}}


def audio_part(seconds: float = 1.0, hertz: float = 440.0) -> dict[str, object]:
    data = base64.b64encode(wav(seconds, hertz)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
