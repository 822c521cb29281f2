"""Audio of any container to mono float32 at 16 kHz, in blocks, so that length is judged before memory is spent.

soundfile reads what libsndfile knows (WAV, FLAC, Ogg, MP3, AIFF), PyAV the rest (M4A, AAC, WebM, a video's track), and
soxr resamples with the very filter that Qwen's own helper reaches through librosa. That helper, ``process_mm_info``, is
not called: it opens any address and any path, knows no limits, and needs an ffmpeg program for a video's sound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omnifp4.chat.arrays import as_array
from omnifp4.chat.errors import MediaError, need
from omnifp4.chat.sources import Encoded, check_codec, open_container

Samples = NDArray[np.float32]
"""Mono, 16 kHz, shape ``(samples,)``."""

RATE = 16_000
MIN_SAMPLES = 400
"""25 ms, one window of the feature extractor; it fails on less."""
LEAST_RATE, MOST_RATE = 1_000, 768_000
"""Samples a second that are believed; a resampler's filter grows with the rate."""
MOST_AMPLITUDE = float(1 << 31)
"""Full scale of 32-bit samples that somebody wrote as floats; far above it, the power of a spectrum overflows."""
BLOCK = 1 << 18
"""Samples read at a time, of all channels together."""

TooLong = Literal["refuse", "trim"]


def decode_audio(
    encoded: Encoded, max_seconds: float, too_long: TooLong, where: str, max_decode_seconds: float = math.inf
) -> tuple[Samples, str]:
    """Reads encoded audio.

    Args:
        encoded: the file.
        max_seconds: limit of its length.
        too_long: refuse longer audio, or keep its beginning.
        where: for errors.
        max_decode_seconds: of computing; what takes longer is refused.

    Returns:
        The samples, and a note on what was cut or an empty string.
    """
    sf = need("soundfile", "reading audio")
    try:
        file = sf.SoundFile(encoded.open())
    except (sf.LibsndfileError, RuntimeError) as error:
        del error  # PyAV reads more, and says what is wrong with the rest.
        return _decode_with_av(encoded, max_seconds, too_long, where, max_decode_seconds)
    with file:
        seconds = file.frames / file.samplerate
        if too_long == "refuse" and seconds > max_seconds:
            raise _too_long(encoded.name, seconds, max_seconds, where)

        def blocks() -> Iterator[Samples]:
            frames = max(1, BLOCK // file.channels)
            while len(block := file.read(frames, dtype="float32", always_2d=True)):
                yield block.mean(axis=1, dtype=np.float32)

        try:
            return _collect(blocks(), file.samplerate, max_seconds, too_long, where, encoded.name, max_decode_seconds)
        except (sf.LibsndfileError, RuntimeError) as error:
            raise MediaError(f"{where}: {encoded.name} is damaged: {error}") from error


def audio_from_array(
    value: Any, rate: int | None, max_seconds: float, too_long: TooLong, where: str
) -> tuple[Samples, str]:
    """Samples as an array, ``(samples,)`` or two-dimensional with the channels on the shorter axis.

    Args:
        value: floats in [-1, 1] or integers of full scale; or a pair of array and rate, in either order.
        rate: samples a second; None means 16 kHz.
        max_seconds: as in `decode_audio`.
        too_long: as in `decode_audio`.
        where: for errors.
    """
    if isinstance(value, tuple) and len(value) == 2:
        value, own = value if isinstance(value[1], int | np.integer) else (value[1], value[0])
        rate = int(own) if isinstance(own, int | np.integer) else rate
    rate = RATE if rate is None else rate
    if not isinstance(rate, int) or isinstance(rate, bool) or not LEAST_RATE <= rate <= MOST_RATE:
        raise MediaError(f"{where}: the sampling rate is {rate!r}", hint="a whole number of samples a second")
    array = as_array(value, "audio", where)
    if array.ndim == 2:
        array = array if array.shape[0] >= array.shape[1] else array.T
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] > 32):
        raise MediaError(f"{where}: an array of shape {array.shape} is no audio", hint="(samples,)")
    if np.issubdtype(array.dtype, np.signedinteger):
        array = array.astype(np.float32) / float(-np.iinfo(array.dtype).min)
    elif array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128) / 128
    elif not np.issubdtype(array.dtype, np.floating):
        raise MediaError(f"{where}: audio of type {array.dtype} is not read", hint="floats or signed integers")
    mono = array.mean(axis=1) if array.ndim == 2 else array
    seconds = len(mono) / rate
    if too_long == "refuse" and seconds > max_seconds:
        raise _too_long("the audio", seconds, max_seconds, where)
    blocks = (mono[start : start + BLOCK].astype(np.float32) for start in range(0, len(mono), BLOCK))
    return _collect(blocks, rate, max_seconds, too_long, where, "the audio")


def audio_track(
    encoded: Encoded, max_seconds: float, where: str, max_decode_seconds: float = math.inf
) -> Samples | None:
    """The sound of a video, cut at `max_seconds`; None where it has none. Otherwise as `decode_audio`."""
    with open_container(encoded) as container:
        if not container.streams.audio:
            return None
    try:
        return _decode_with_av(encoded, max_seconds, "trim", where, max_decode_seconds, of_video=True)[0]
    except _Nothing:
        return None


class _Nothing(MediaError):
    """No samples at all."""


def _decode_with_av(
    encoded: Encoded,
    max_seconds: float,
    too_long: TooLong,
    where: str,
    max_decode_seconds: float,
    of_video: bool = False,
) -> tuple[Samples, str]:
    av = need("av", "reading audio")
    try:
        with open_container(encoded) as container:
            if not container.streams.audio:
                raise MediaError(f"{where}: {encoded.name} has no sound", hint="pass it as video or image")
            moving = [stream for stream in container.streams.video if not stream.disposition & 0x400]
            if moving and not of_video:
                raise MediaError(f"{where}: {encoded.name} is a video", hint="pass it as video; its sound comes along")
            stream = container.streams.audio[0]
            check_codec(stream, encoded.name, where)
            duration = float(container.duration or 0) / 1e6
            if too_long == "refuse" and duration > max_seconds:
                raise _too_long(encoded.name, duration, max_seconds, where)
            rate = stream.rate
            # Channels beside each other in one plane: of eight planes and more, PyAV reads beyond the last.
            resampler = av.AudioResampler(format="flt", layout=stream.layout.name, rate=rate)

            def blocks() -> Iterator[Samples]:
                first = None
                for frame in container.decode(stream):
                    form = (frame.layout.nb_channels, frame.rate, frame.format.name)
                    first = first or form
                    if form != first:
                        # The resampler is made for the first frame, and would hand on any other as it is.
                        raise MediaError(
                            f"{where}: {encoded.name} is damaged, or of several pieces: {first[0]} channels at {first[1]} "
                            f"become {form[0]} at {form[1]}"
                        )
                    for part in resampler.resample(frame):
                        yield part.to_ndarray().reshape(part.samples, -1).mean(axis=1, dtype=np.float32)

            return _collect(blocks(), rate, max_seconds, too_long, where, encoded.name, max_decode_seconds)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{where}: {encoded.name} is damaged or no audio: {error}") from error


def _collect(
    blocks: Iterator[Samples],
    rate: int,
    max_seconds: float,
    too_long: TooLong,
    where: str,
    name: str,
    max_decode_seconds: float = math.inf,
) -> tuple[Samples, str]:
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise MediaError(
            f"{where}: {name} has a sampling rate of {rate}", hint=f"allowed: {LEAST_RATE:,} to {MOST_RATE:,} a second"
        )
    deadline = time.monotonic() + max_decode_seconds
    limit = int(max_seconds * RATE)
    stream = None
    if rate != RATE:
        stream = need("soxr", "resampling audio").ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
    parts: list[Samples] = []
    count = 0
    for block in blocks:
        if time.monotonic() > deadline:
            raise MediaError(
                f"{where}: {name} takes more than {max_decode_seconds:g} s to decode", hint="convert it first"
            )
        if not np.isfinite(block).all():
            raise MediaError(f"{where}: {name} holds samples that are not finite numbers")
        if (loudest := float(np.abs(block).max(initial=0))) > MOST_AMPLITUDE:
            raise MediaError(f"{where}: {name} holds samples of {loudest:.1e}", hint="sound lies between -1 and 1")
        block = stream.resample_chunk(block) if stream is not None else block
        parts.append(block)
        count += len(block)
        if count > limit:
            break
    else:
        if stream is not None:
            parts.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(samples):
        raise _Nothing(f"{where}: {name} has no samples: its length is zero")
    if len(samples) < MIN_SAMPLES:
        raise MediaError(
            f"{where}: {name} lasts {len(samples) / RATE * 1000:.1f} ms", hint="the model needs 25 ms of sound at least"
        )
    if len(samples) <= limit:
        return samples, ""
    if too_long == "refuse":
        raise _too_long(name, len(samples) / RATE, max_seconds, where, "more than ")
    return samples[:limit], f"{where}: only the first {max_seconds:g} s of {name} were read"


def _too_long(name: str, seconds: float, max_seconds: float, where: str, more: str = "") -> MediaError:
    return MediaError(
        f"{where}: {name} lasts {more}{seconds:.0f} s; the limit is {max_seconds:g} s",
        hint="cut it, or set long_media='trim' to use its beginning",
    )
