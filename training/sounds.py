"""Recordings to log-mel features on the device, in batches, with all kinds of variation.

The features are those of the checkpoint's ``WhisperFeatureExtractor`` for each recording alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data import RATE, Data

HEARING = 16_000
"""Hertz of the model's input."""
SPEAKING = 24_000
"""Hertz of the model's output."""
HOP = 160
MOST_FRAMES = 200
"""Mel frames of the longest training example: two seconds."""
LONGEST = 10_400
"""Samples kept of a recording, at 8 kHz: 1.3 s."""


def bank(data: Data, rate: int, device: Any) -> tuple[Tensor, Tensor]:
    """All recordings at a multiple of their rate, band-limited.

    Returns:
        ``(n, LONGEST * rate / 8000)`` float32, zeros behind the end; and lengths in samples, ``(n,)``.
    """
    count = len(data.wave_ends)
    low = np.zeros((count, LONGEST), np.float32)
    lengths = np.zeros(count, np.int64)
    for number in range(count):
        one = data.recording(number)[:LONGEST]
        low[number, : len(one)] = one
        lengths[number] = len(one)
    return raised(torch.from_numpy(low).to(device), rate // RATE), torch.from_numpy(lengths * (rate // RATE)).to(device)


def raised(low: Tensor, times: int) -> Tensor:
    """Sound at `times` its rate, by zeros in the spectrum; ``(n, samples)``."""
    spectrum = torch.fft.rfft(low)
    return torch.fft.irfft(spectrum, n=low.shape[-1] * times) * times


def mel_filters() -> Tensor:
    """The feature extractor's filters, ``(201, 128)``."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=201, num_mel_filters=128, min_frequency=0.0, max_frequency=8000.0,
        sampling_rate=HEARING, norm="slaney", mel_scale="slaney",
    )  # fmt: skip
    return torch.from_numpy(filters).float()


def vary(waves: Tensor, speed: Tensor, start: Tensor, samples: Tensor, random: torch.Generator) -> Tensor:
    """Recordings at another speed and place, with gain and noise.

    Args:
        waves: ``(n, samples)`` at 16 kHz.
        speed: above 1 is faster and higher, ``(n,)``.
        start: sample at which the recording begins, ``(n,)``.
        samples: of the result; what lies behind is zero, ``(n,)``.
        random: of gain and noise, on the device.

    Returns:
        ``(n, MOST_FRAMES * HOP)``.
    """
    count, device = len(waves), waves.device
    place = torch.arange(MOST_FRAMES * HOP, device=device)[None]
    source = (place - start[:, None]) * speed[:, None]
    low = source.floor().long()
    part = source - low
    last = waves.shape[1] - 2
    within = (low >= 0) & (low <= last)
    low = low.clamp(0, last)
    sound = torch.gather(waves, 1, low) * (1 - part) + torch.gather(waves, 1, low + 1) * part
    sound = sound * within

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, generator=random, device=device) * (high - low) + low

    power = sound.square().sum(1, keepdim=True) / within.sum(1, keepdim=True).clamp(min=1)
    noise = torch.fft.rfft(torch.randn(sound.shape, generator=random, device=device))
    colour = torch.arange(1, noise.shape[1] + 1, device=device).float() ** -uniform(0, 1)
    noise = torch.fft.irfft(noise * colour, n=sound.shape[1])
    noise = noise / noise.square().mean(1, keepdim=True).sqrt()
    ratio = torch.where(uniform(0, 1) < 0.35, 1e-4, 10 ** (-uniform(8, 45) / 20))
    sound = (sound + noise * ratio * power.sqrt()) * 10 ** (uniform(-24, 14) / 20)
    return sound.clamp(-1, 1) * (place < samples[:, None])


def log_mel(waves: Tensor, frames: Tensor, filters: Tensor, random: torch.Generator | None = None) -> Tensor:
    """Features of each wave alone.

    Args:
        waves: ``(n, samples)`` at 16 kHz, zeros behind the end.
        frames: valid frames of 10 ms, ``(n,)``.
        filters: `mel_filters`, on the device.
        random: for a varied vocal tract, room and masking; None leaves them.

    Returns:
        ``(n, 128, samples // 160)``, zero behind each one's frames.
    """
    count, device = len(waves), waves.device
    window = torch.hann_window(400, device=device)
    spectrum = torch.stft(waves, 400, HOP, window=window, return_complex=True)[..., :-1].abs().square()
    valid = torch.arange(spectrum.shape[-1], device=device)[None] < frames[:, None]
    if random is not None:

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=random, device=device) * (high - low) + low

        bins = torch.arange(201, device=device)[None] * torch.where(uniform(0, 1, 1) < 0.3, 1.0, uniform(0.86, 1.16, 1))
        low = bins.floor().long().clamp(max=199)
        part = (bins - low).clamp(0, 1)[:, :, None]
        index = low[:, :, None].expand(-1, -1, spectrum.shape[-1])
        spectrum = torch.gather(spectrum, 1, index) * (1 - part) + torch.gather(spectrum, 1, index + 1) * part
        room = torch.nn.functional.interpolate(uniform(-0.7, 0.7, 1, 7), size=201, mode="linear")[:, 0]
        spectrum = spectrum * 10 ** room[:, :, None]
    mel = torch.einsum("nft,fm->nmt", spectrum, filters).clamp(min=1e-10).log10()
    top = mel.masked_fill(~valid[:, None], -torch.inf).amax((1, 2), keepdim=True)
    mel = (torch.maximum(mel, top - 8) + 4) / 4
    if random is not None:
        times = torch.arange(mel.shape[-1], device=device)[None]
        begin, length = uniform(0, 60, 1), uniform(0, 7, 1)
        mel = mel.masked_fill(((times >= begin) & (times < begin + length))[:, None], 0.0)
        bands = torch.arange(128, device=device)[None]
        begin, length = uniform(0, 118, 1), uniform(0, 10, 1)
        mel = mel.masked_fill(((bands >= begin) & (bands < begin + length))[:, :, None], 0.0)
    return mel * valid[:, None]
