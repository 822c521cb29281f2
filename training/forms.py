"""Held-out digits in other forms than training and examination use, through `omnifp4.OmniChat` as a user has it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from training.data import RATE, Data
from training.sounds import HEARING

Array = np.ndarray[Any, Any]

NOISE = 0.01
"""Root mean square of noise beside that of the recording: -40 dB."""


def image(picture: Array, wide: int, high: int, smooth: bool, inverted: bool = False) -> Any:
    """An 8 x 8 picture in [0, 1] as an RGB image, scaled up."""
    from PIL import Image

    grey = Image.fromarray((np.where(inverted, 1 - picture, picture) * 255).round().astype(np.uint8))
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return grey.resize((wide, high), how).convert("RGB")


def jpeg(of: Any) -> bytes:
    file = io.BytesIO()
    of.save(file, "JPEG", quality=75)
    return file.getvalue()


def coloured(picture: Array) -> Any:
    """Yellow on dark blue."""
    from PIL import Image

    ink = np.asarray(image(picture, 96, 96, True), np.float32) / 255
    return Image.fromarray((ink * (255, 220, 60) + (1 - ink) * (20, 20, 90)).astype(np.uint8))


def in_margin(picture: Array) -> Any:
    from PIL import Image

    canvas = Image.new("RGB", (112, 112))
    canvas.paste(image(picture, 80, 80, True), (16, 16))
    return canvas


PICTURES: dict[str, Callable[[Array], Any]] = {
    "8x8": lambda one: image(one, 8, 8, False),
    "64 blocky": lambda one: image(one, 64, 64, False),
    "64 smooth": lambda one: image(one, 64, 64, True),
    "100 smooth": lambda one: image(one, 100, 100, True),
    "128 blocky": lambda one: image(one, 128, 128, False),
    "224 smooth": lambda one: image(one, 224, 224, True),
    "224 blocky": lambda one: image(one, 224, 224, False),
    "inverted 64 blocky": lambda one: image(one, 64, 64, False, inverted=True),
    "inverted 128 smooth": lambda one: image(one, 128, 128, True, inverted=True),
    "JPEG 128 q75": lambda one: jpeg(image(one, 128, 128, True)),
    "coloured 96": coloured,
    "with margin 112": in_margin,
    "96x128 stretched": lambda one: image(one, 96, 128, True),
}


def at_rate(samples: Array, rate: int) -> Array:
    """A recording at another rate, by zeros in its spectrum."""
    count = round(len(samples) * rate / RATE)
    return (np.fft.irfft(np.fft.rfft(samples), count) * (count / len(samples))).astype(np.float32)


def heard(samples: Array, before: float = 0.0, behind: float = 0.0, noise: float = 0.0) -> Array:
    """At 16 kHz, with seconds of silence around it and noise."""
    wave = np.pad(at_rate(samples, HEARING), (int(before * HEARING), int(behind * HEARING)))
    loud = float(np.sqrt(np.mean(samples**2)))
    return wave + np.random.default_rng(len(wave)).normal(0, noise * loud, len(wave)).astype(np.float32)


SOUNDS: dict[str, Callable[[Array], Any]] = {
    "8 kHz": lambda one: (one, RATE),
    "16 kHz": lambda one: (heard(one), HEARING),
    "44.1 kHz": lambda one: (at_rate(one, 44_100), 44_100),
    "x0.1": lambda one: (0.1 * heard(one), HEARING),
    "x0.3": lambda one: (0.3 * heard(one), HEARING),
    "to full scale": lambda one: (heard(one) / np.abs(heard(one)).max(), HEARING),
    "0.3 s silence around": lambda one: (heard(one, 0.3, 0.3), HEARING),
    "0.5 s before": lambda one: (heard(one, before=0.5), HEARING),
    "1 s after": lambda one: (heard(one, behind=1.0), HEARING),
    "1 s around": lambda one: (heard(one, 1.0, 1.0), HEARING),
    "noise -40 dB": lambda one: (heard(one, noise=NOISE), HEARING),
}


def examine(checkpoint: Path, data: Data, every: int) -> Iterator[tuple[str, int, int]]:
    """Asks for each form's digit.

    Args:
        checkpoint: folder of the model.
        data: of which every so many held-out examples are asked for.
        every: so many.

    Yields:
        Form, right answers, questions.
    """
    from omnifp4 import OmniChat

    chat = OmniChat(checkpoint, speech=False)

    def right(digit: int, question: str, **media: Any) -> bool:
        chat.reset()
        return chat.ask(question, temperature=0, max_new_tokens=4, **media).text.strip() == str(digit)

    numbers = data.picture_numbers(True)[::every]
    for name, form in PICTURES.items():
        good = [
            right(int(data.picture_digits[one]), "Which digit is in the picture?", images=[form(data.pictures[one])])
            for one in numbers
        ]
        yield f"picture {name}", sum(good), len(good)
    numbers = data.wave_numbers(True)[::every]
    for name, form in SOUNDS.items():
        good = [
            right(int(data.wave_digits[one]), "Which digit is spoken?", audios=[form(data.recording(one))])
            for one in numbers
        ]
        yield f"sound {name}", sum(good), len(good)
