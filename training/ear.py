"""A listener that teaches the codec what in a digit matters. Not the judge: another network, features and weights."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import Data
from training.sounds import HEARING, HOP, MOST_FRAMES, bank, vary
from training.steps import Step, rate_of, variation

BANDS = 64
"""Mel bands, up to 4 kHz: the recordings hold nothing above."""
FLOOR = 1e-5
"""Of the loudest band's power: what lies deeper is not heard."""
WIDTHS = (BANDS, 96, 128, 128, 128)


class Ear(nn.Module):
    """Log-mel bands ``(n, 64, frames)`` to logits ``(n, 10)``, convolutions over time only."""

    def __init__(self) -> None:
        super().__init__()
        filters = ear_filters()
        self.register_buffer("filters", filters, persistent=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(before, after, 5, stride=1 + (number > 0), padding=2), nn.GroupNorm(8, after), nn.GELU()
            )
            for number, (before, after) in enumerate(itertools.pairwise(WIDTHS))
        )
        self.last = nn.Linear(WIDTHS[-1], 10)

    def bands(self, waves: Tensor) -> Tensor:
        """``(n, samples)`` at 16 kHz to ``(n, 64, samples // 160 + 1)``, about zero to one."""
        window = torch.hann_window(400, device=waves.device)
        spectrum = torch.stft(waves, 400, HOP, window=window, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        mel = torch.einsum("nft,fm->nmt", power, self.filters)
        loudest = mel.detach().amax((1, 2), keepdim=True).clamp(min=1e-6)
        return (mel / loudest + FLOOR).log10() / 5 + 1

    def forward(self, bands: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and what every block makes of the sound, ``(n, channels, frames)``."""
        states, kept = bands, []
        for block in self.blocks:
            states = block(states)
            kept.append(states)
        return self.last(states.amax(-1)), kept


def ear_filters() -> Tensor:
    """``(201, 64)``."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=201, num_mel_filters=BANDS, min_frequency=50.0, max_frequency=4000.0,
        sampling_rate=HEARING, norm=None, mel_scale="htk",
    )  # fmt: skip
    return torch.from_numpy(filters).float()


def train(ear: Ear, data: Data, clock_of: Any, seed: int, capture: bool = False, count: int = 128) -> None:
    """Trains on the training recordings, at other speeds and places, with gain and noise."""
    device = next(ear.parameters()).device
    waves, lengths = bank(data, HEARING, device)
    numbers = torch.from_numpy(data.wave_numbers(False)).to(device)
    digits = torch.from_numpy(data.wave_digits).to(device)
    random = variation(device, seed)
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        ear.parameters(), lr=rate_of(device, 1e-3), weight_decay=0.02, fused=cuda, capturable=cuda
    )
    clock = clock_of(optimizer, {"ear": ear})
    ear.train()

    def learn(_: dict[str, Tensor]) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        pick = numbers[torch.randint(len(numbers), (count,), generator=random, device=device)]
        speed = torch.rand(count, generator=random, device=device) * 0.4 + 0.8
        start = (torch.rand(count, generator=random, device=device) ** 2 * 0.4 * HEARING).long()
        samples = (start + lengths[pick] / speed).long().clamp(max=MOST_FRAMES * HOP)
        logits, _ = ear(ear.bands(vary(waves[pick], speed, start, samples, random)))
        loss = F.cross_entropy(logits, digits[pick])
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    step = Step(learn, device, capture)
    for _ in clock:
        values = step({})
        if clock.tell:
            clock.say(values)
    ear.eval()
    clock.done()


def compare(ear: Ear, made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """How differently two sounds are heard.

    Args:
        ear: trained.
        made: ``(n, samples)`` at 16 kHz, with gradients.
        real: the same shape.

    Returns:
        Mean distance of the bands, and of what the blocks make of them relative to its size.
    """
    one, two = ear.bands(made), ear.bands(real)
    heard: Any = 0.0
    with torch.no_grad():
        _, wanted = ear(two)
    _, kept = ear(one)
    for mine, other in zip(kept, wanted, strict=True):
        heard = heard + (mine - other).abs().mean() / other.abs().mean()
    return (one - two).abs().mean(), heard / len(wanted)


def difference(made: Tensor, real: Tensor) -> Tensor:
    """Spectral distance at several resolutions, linear and logarithmic, below and above what the ear weighs."""
    total: Any = 0.0
    for size in (256, 512, 1024, 2048):
        window = torch.hann_window(size, device=made.device)
        one, two = (
            torch.stft(wave, size, size // 4, window=window, return_complex=True).abs() for wave in (made, real)
        )
        # The recordings hold nothing above 4 kHz: silence there is learned too, but must not rule.
        top = size // 6 + 1
        one_log, two_log = (one[:, :top] + 2e-3).log(), (two[:, :top] + 2e-3).log()
        total = total + F.l1_loss(one_log, two_log) + 4 * F.l1_loss(one, two) / (two.mean() + 0.02)
    return total / 4
