"""Speech as files and streams."""

from __future__ import annotations

import io
import struct
from typing import Final

import numpy as np

from omnifp4.chat.answer import SAMPLING_RATE, Waveform
from omnifp4.chat.errors import need
from omnifp4.serve.errors import bad_request

MEDIA_TYPES: Final = {
    "wav": "audio/wav",
    "pcm16": f"audio/pcm;rate={SAMPLING_RATE};channels=1",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "opus": "audio/ogg",
}

_CONTAINERS: Final = {"mp3": ("MP3", "MPEG_LAYER_III"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}
"""libsndfile's names of format and subtype."""

_UNKNOWN: Final = 0xFFFFFFFF
"""The length in a WAV header whose end is not known; players read on until the data ends."""


def pcm16(waveform: Waveform) -> bytes:
    """Samples in [-1, 1] as 16-bit little-endian; what lies outside is clipped."""
    return bytes(np.rint(np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())


def wav_header(data_bytes: int | None) -> bytes:
    """Of mono 16-bit at 24 kHz; None: the length is not known yet."""
    size = _UNKNOWN if data_bytes is None else data_bytes
    total = _UNKNOWN if data_bytes is None else data_bytes + 36
    form = struct.pack("<HHIIHH", 1, 1, SAMPLING_RATE, SAMPLING_RATE * 2, 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", total)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", size)
    )


def encode(waveform: Waveform, form: str) -> bytes:
    """A whole file.

    Args:
        waveform: mono at 24 kHz.
        form: one of `MEDIA_TYPES`.

    Raises:
        ApiError: the installed libsndfile cannot write it.
    """
    if form == "pcm16":
        return pcm16(waveform)
    if form == "wav":
        data = pcm16(waveform)
        return wav_header(len(data)) + data
    check_format(form)
    container, subtype = _CONTAINERS[form]
    file = io.BytesIO()
    need("soundfile", "writing audio").write(file, waveform, SAMPLING_RATE, format=container, subtype=subtype)
    return file.getvalue()


def check_format(form: str) -> None:
    """Refuses a format that this machine cannot write, before any work is done for it."""
    if form not in _CONTAINERS:
        return
    container, subtype = _CONTAINERS[form]
    sf = need("soundfile", "writing audio")
    if container not in sf.available_formats() or subtype not in sf.available_subtypes(container):
        raise bad_request(f"the format {form!r} cannot be written here", "audio.format", "unsupported_value")
