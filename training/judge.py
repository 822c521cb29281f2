"""A separate small classifier of spoken digits, trained on real recordings only: the judge of what the model says."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import Data
from training.sounds import HEARING, HOP, MOST_FRAMES, bank, log_mel, mel_filters, vary


class Judge(nn.Module):
    """Log-mel features ``(n, 128, frames)`` to logits ``(n, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 24, 48, 64, 64)
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            parts += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.GELU()]
        self.parts = nn.Sequential(*parts)
        self.mix = nn.Conv1d(64 * 8, 96, 3, padding=1)
        self.last = nn.Linear(96, 10)

    def forward(self, mel: Tensor) -> Tensor:
        states = self.parts(mel[:, None]).flatten(1, 2)
        return self.last(F.gelu(self.mix(states)).amax(-1))


def train(judge: Judge, data: Data, clock_of: Any, seed: int, count: int = 128) -> None:
    """Trains on the training recordings, varied as for the thinker."""
    device = next(judge.parameters()).device
    waves, lengths = bank(data, HEARING, device)
    filters = mel_filters().to(device)
    numbers = torch.from_numpy(data.wave_numbers(False)).to(device)
    digits = torch.from_numpy(data.wave_digits).to(device)
    random = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.02, fused=device.type == "cuda")
    clock = clock_of(optimizer, {"judge": judge})
    judge.train()
    for _ in clock:
        pick = numbers[torch.randint(len(numbers), (count,), generator=random, device=device)]
        speed = torch.rand(count, generator=random, device=device) * 0.4 + 0.8
        start = (torch.rand(count, generator=random, device=device) ** 2 * 0.4 * HEARING).long()
        tail = torch.rand(count, generator=random, device=device) ** 2 * 0.4 * HEARING
        samples = (start + lengths[pick] / speed + tail).long().clamp(max=MOST_FRAMES * HOP)
        frames = samples // HOP
        mel = log_mel(vary(waves[pick], speed, start, samples, random), frames, filters, random)
        loss = F.cross_entropy(judge(mel), digits[pick])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if clock.tell:
            clock.say({"loss": loss})
    judge.eval()
    clock.done()


@torch.no_grad()
def heard(judge: Judge, waves: Tensor, samples: Tensor) -> Tensor:
    """The digits that the judge hears.

    Args:
        judge: trained.
        waves: ``(n, samples)`` at 16 kHz, zeros behind the end.
        samples: lengths, ``(n,)``.
    """
    longest = -(-max(int(samples.max()), 8 * HOP) // HOP) * HOP
    waves = F.pad(waves, (0, max(0, longest - waves.shape[1])))[:, :longest]
    return judge(log_mel(waves, samples // HOP, mel_filters().to(waves.device))).argmax(-1)


def lowered(waves: Tensor) -> Tensor:
    """Sound of 24 kHz at 16 kHz, band-limited; the number of samples must be a multiple of three."""
    spectrum = torch.fft.rfft(waves)
    size = waves.shape[-1] // 3 * 2
    return torch.fft.irfft(spectrum[..., : size // 2 + 1], n=size) * (2 / 3)


@torch.no_grad()
def examine(judge: Judge, data: Data) -> float:
    """Its accuracy on the held-out recordings."""
    device = next(judge.parameters()).device
    waves, lengths = bank(data, HEARING, device)
    numbers = torch.from_numpy(data.wave_numbers(True)).to(device)
    digits = torch.from_numpy(data.wave_digits).to(device)
    return float((heard(judge, waves[numbers], lengths[numbers]) == digits[numbers]).float().mean())
