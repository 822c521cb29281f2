"""Hears which digit is spoken: a small classifier that learned from real recordings alone, never from made speech.

Its weights come from this project's training script, its licence is that of the recordings; both stand beside it. It knows
six speakers of the Free Spoken Digit Dataset, at 8 kHz, so what it is given is brought to that band first. Whether it
understands another voice shows in its share of the reference's digits, which is told beside the model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from importlib.resources import as_file, files
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Listener = Callable[[npt.NDArray[np.float32]], str]
"""Waveform at 24 kHz to what is heard."""

HEARING_HERTZ: Final = 16_000
HOP: Final = 160
WINDOW: Final = 400
MEL_BANDS: Final = 128
WIDTHS: Final = (1, 24, 48, 64, 64)
LEAST_SAMPLES: Final = 8 * HOP
"""Shorter sound is filled up with silence."""


class DigitClassifier(nn.Module):
    """Log-mel features ``(n, 128, frames)`` to logits ``(n, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(WIDTHS):
            parts += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.GELU()]
        self.parts = nn.Sequential(*parts)
        self.mix = nn.Conv1d(WIDTHS[-1] * MEL_BANDS // 16, 96, 3, padding=1)
        self.last = nn.Linear(96, 10)

    def forward(self, mel: Tensor) -> Tensor:
        """Logits."""
        states = self.parts(mel[:, None]).flatten(1, 2)
        logits: Tensor = self.last(F.gelu(self.mix(states)).amax(-1))
        return logits


@cache
def load_listener() -> Listener:
    """The classifier as a function of a waveform, float32 ``[samples]`` at 24 kHz; it gives a digit as text."""
    from safetensors.torch import load_file

    classifier = DigitClassifier()
    with as_file(files("omnifp4.evaluation").joinpath("listener", "judge.safetensors")) as path:
        classifier.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    classifier.eval().requires_grad_(False)
    filters = _filters()

    def listen(wave: npt.NDArray[np.float32]) -> str:
        if not np.isfinite(wave).all():
            return ""
        with torch.no_grad():
            return str(int(classifier(log_mel(lowered(torch.from_numpy(wave)), filters)[None]).argmax()))

    return listen


def lowered(wave: Tensor) -> Tensor:
    """Sound of 24 kHz at 16 kHz with nothing above 4 kHz, as of a recording at 8 kHz."""
    wave = F.pad(wave, (0, -wave.shape[-1] % 6))
    spectrum = torch.fft.rfft(wave)
    size = wave.shape[-1] // 3 * 2
    # Zeros above keep the length; a factor keeps the loudness.
    raised: Tensor = torch.fft.irfft(spectrum[: size // 4 + 1], n=size) * (2 / 3)
    return raised


def log_mel(wave: Tensor, filters: Tensor) -> Tensor:
    """Features ``(128, frames)`` of sound at 16 kHz, as ``WhisperFeatureExtractor`` makes them of a recording alone."""
    samples = wave.shape[-1]
    wave = F.pad(wave, (0, max(LEAST_SAMPLES, -(-samples // HOP) * HOP) - samples))
    spectrum = torch.stft(wave, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)[:, :-1]
    mel = torch.einsum("ft,fm->mt", spectrum.abs().square(), filters).clamp(min=1e-10).log10()
    valid = torch.arange(mel.shape[-1]) < max(1, samples // HOP)
    mel = (torch.maximum(mel, mel[:, valid].amax() - 8) + 4) / 4
    return mel * valid


def _filters() -> Tensor:
    from transformers.audio_utils import mel_filter_bank

    make: Any = mel_filter_bank
    filters = make(
        num_frequency_bins=WINDOW // 2 + 1, num_mel_filters=MEL_BANDS, min_frequency=0.0, max_frequency=8000.0,
        sampling_rate=HEARING_HERTZ, norm="slaney", mel_scale="slaney",
    )  # fmt: skip
    return torch.from_numpy(filters).float()
