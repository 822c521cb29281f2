"""Stage: a small codec. Its encoder and quantizer are used in training only; its decoder is the model's code2wav.

The codebooks are code2wav's own code embedding. Group after group takes the code nearest to what is left of the
encoder's output; code2wav reads the mean of the embeddings, so what it reads is the quantized output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import Data
from training.ear import Ear, compare, difference
from training.judge import lowered
from training.sounds import SPEAKING, bank
from training.steps import Step, rate_of, variation

FRAME = 1920
"""Samples at 24 kHz of one frame of codes."""
CROP = 16
"""Frames of a training example."""
LEAST_PLAIN, MOST_PLAIN = 150, 600
"""Steps of a new codec without its quantizer, so that there is something to quantize."""
CLEAR = 4.0
"""Spectral distance below which a new codec is ready for its quantizer; one that makes no speech yet stays near 5."""
BANDS_WEIGHT, HEARD_WEIGHT, NAMED_WEIGHT = 8.0, 1.0, 0.1
"""Weights of what `training.ear` hears, beside the spectral distance."""
EMBEDDED = 0.4
"""Standard deviation of what a new encoder gives; the mean of six standard normal embeddings has as much."""
STRIDES = (3, 4, 5, 8, 2, 2)
WIDTHS = (16, 32, 64, 96, 128, 128, 128)


class Unit(nn.Module):
    """A residual pair of convolutions."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.wide = nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation)
        self.narrow = nn.Conv1d(width, width, 1)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.narrow(F.elu(self.wide(F.elu(states))))


class Encoder(nn.Module):
    """Waveform ``(n, 1920 * frames)`` to ``(n, frames, width)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv1d(1, WIDTHS[0], 7, padding=3)]
        for before, after, stride in zip(WIDTHS[:-1], WIDTHS[1:], STRIDES, strict=True):
            parts += [Unit(before, 1), Unit(before, 3), nn.ELU()]
            parts.append(nn.Conv1d(before, after, 2 * stride, stride=stride, padding=(stride + 1) // 2))
        self.parts = nn.Sequential(*parts, Unit(WIDTHS[-1], 1), nn.ELU(), nn.Conv1d(WIDTHS[-1], width, 1))

    def forward(self, waves: Tensor) -> Tensor:
        frames = waves.shape[-1] // FRAME
        return self.parts(waves[:, None])[..., :frames].transpose(1, 2)


class Quantizer:
    """Residual quantization with the vocoder's own embedding as codebooks.

    Args:
        vocoder: ``Qwen3OmniMoeCode2Wav``.
    """

    def __init__(self, vocoder: Any) -> None:
        self.vocoder = vocoder
        self.count, self.size = vocoder.config.num_quantizers, vocoder.config.codebook_size
        self.used = torch.full((self.count, self.size), 2.0, device=vocoder.device)

    def books(self) -> Tensor:
        return self.vocoder.code_embedding.weight.view(self.count, self.size, -1)

    def __call__(self, states: Tensor, learn: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes.

        Args:
            states: ``(n, frames, width)``.
            learn: replace codes that nothing is nearest to.

        Returns:
            Codes ``(n, groups, frames)``; what code2wav reads, with gradients to encoder and codebooks; the loss that
            draws the two together.
        """
        left = states.reshape(-1, states.shape[-1]) * self.count
        total: Any = torch.zeros_like(left)
        loss: Any = 0.0
        codes = []
        for group, book in enumerate(self.books()):
            distance = torch.cdist(left.detach(), book.detach())
            nearest = distance.argmin(1)
            if learn:
                self._revive(group, left.detach(), nearest)
            chosen = book[nearest]
            loss = loss + F.mse_loss(chosen, left.detach()) + 0.25 * F.mse_loss(left, chosen.detach())
            total = total + chosen
            left = left - chosen.detach()
            codes.append(nearest.view(states.shape[:2]))
        read = total.view(states.shape) / self.count
        return torch.stack(codes, dim=1), read + (states - states.detach()), loss / self.count

    @torch.no_grad()
    def _revive(self, group: int, left: Tensor, nearest: Tensor) -> None:
        used = torch.zeros_like(self.used[group]).index_add_(0, nearest, torch.ones_like(left[:, 0]))
        self.used[group].mul_(0.98).add_(used)
        dead = self.used[group] < 0.5
        pick = left[torch.randint(len(left), (self.size,), device=left.device)]
        weight = self.vocoder.code_embedding.weight.data[group * self.size : (group + 1) * self.size]
        weight.copy_(torch.where(dead[:, None], pick, weight))
        self.used[group].masked_fill_(dead, 1.0)


def speak(vocoder: Any, states: Tensor) -> Tensor:
    """code2wav after its embedding: ``(n, frames, width)`` to ``(n, samples)``; as its own ``forward``, unclipped."""
    decoder = vocoder.pre_transformer
    places = torch.arange(states.shape[1], device=states.device)[None]
    rotary = decoder.rotary_emb(states, places)
    # Shorter than the sliding window, so causal; the stock mask would wait for the device.
    for layer in decoder.layers:
        states = layer(states, attention_mask=None, position_embeddings=rotary)
    hidden = decoder.norm(states).transpose(1, 2)
    for blocks in vocoder.upsample:
        for block in blocks:
            hidden = block(hidden)
    for block in vocoder.decoder:
        hidden = block(hidden)
    return hidden[:, 0]


@torch.no_grad()
def start(encoder: Encoder, waves: Tensor) -> None:
    """First weights of the encoder, layer by layer of unit size on real sound.

    With PyTorch's own the sound fades from layer to layer, and the encoder says the same of everything for hundreds of steps.

    Args:
        encoder: changes.
        waves: ``(n, samples)`` at 24 kHz.
    """

    def fill(convolution: nn.Conv1d, size: float) -> None:
        convolution.weight.normal_()
        convolution.bias.zero_()  # type: ignore[union-attr]
        convolution.weight.mul_(size / convolution(states).std())

    states = waves[:, None]
    for part in encoder.parts:
        if isinstance(part, Unit):
            before, states = states, F.elu(states)
            fill(part.wide, 1.0)
            states = F.elu(part.wide(states))
            fill(part.narrow, 0.3)
            states = before + part.narrow(states)
            continue
        if isinstance(part, nn.Conv1d):
            # The last gives what code2wav was made ready for: the mean of independent embeddings.
            fill(part, EMBEDDED if part is encoder.parts[-1] else 1.0)
        states = part(states)


def drift(states: Tensor) -> Tensor:
    """How far the encoder's output, ``(n, frames, width)``, is from zero mean and a deviation of `EMBEDDED`; 0 is not at all."""
    spread = states.var((0, 1)).mean() / EMBEDDED**2
    return spread.log().square() + states.mean((0, 1)).square().mean() / EMBEDDED**2


def warm_up(vocoder: Any) -> None:
    """First weights of code2wav that let sound through: the stock ones are for loading, not for training."""
    for name, parameter in vocoder.named_parameters():
        with torch.no_grad():
            if name.endswith((".gamma", "layer_scale.scale")):
                parameter.fill_(0.1)
            elif "conv" in name and parameter.ndim == 3:
                if ".block.1.conv." in name or (".upsample." in f".{name}" and ".0.conv." in name):
                    fan = parameter.shape[0] * (2 if parameter.shape[2] > 2 else 1)
                else:
                    fan = parameter.shape[1] * parameter.shape[2]
                parameter.normal_(0.0, (0.3 if ".conv2." in name else 1.0) * fan**-0.5)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, 1.0 if "code_embedding" in name else 0.5 * parameter.shape[1] ** -0.5)
    codes = torch.randint(vocoder.config.codebook_size, (1, vocoder.config.num_quantizers, 4), device=vocoder.device)
    with torch.no_grad():
        states = vocoder.code_embedding(codes + vocoder.code_offset).mean(1)
        states = vocoder.pre_transformer(inputs_embeds=states).last_hidden_state.transpose(1, 2)
        for blocks in vocoder.upsample:
            for block in blocks:
                states = block(states)
        # Snakes and residual units add up; each block begins at the same loudness, the last at that of speech.
        for number, block in enumerate(vocoder.decoder):
            last = number == len(vocoder.decoder) - 1
            inner = getattr(block, "block", None)
            convolution = inner[1].conv if inner is not None else getattr(block, "conv", None)
            if convolution is not None:
                for _ in range(4):
                    convolution.weight.mul_((0.05 if last else 0.7) / block(states).std())
            states = block(states)


def train(
    model: Any,
    encoder: Encoder,
    ear: Ear,
    data: Data,
    clock_of: Any,
    seed: int,
    *,
    fresh: bool = True,
    capture: bool = False,
    count: int = 48,
) -> None:
    """Trains encoder, codebooks and code2wav on the training recordings.

    Args:
        model: the whole model; only its code2wav changes.
        encoder: changes too.
        ear: a trained listener, which stays as it is.
        data: recordings.
        clock_of: a function from ``(optimizer, modules)`` to a `Clock`.
        seed: of the crops.
        fresh: begin with new weights; without a quantizer at first, then with code books taken from what it gets.
        capture: as for `training.steps.Step`.
        count: crops at once.
    """
    vocoder = model.code2wav
    device = vocoder.device
    waves, lengths = bank(data, SPEAKING, device)
    numbers = torch.from_numpy(data.wave_numbers(False)).to(device)
    digits = torch.from_numpy(data.wave_digits).to(device)
    random = variation(device, seed)
    modules = nn.ModuleDict({"encoder": encoder, "code2wav": vocoder})
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=rate_of(device, 1e-3), betas=(0.8, 0.99), weight_decay=0.0, fused=cuda, capturable=cuda
    )
    quantizer = Quantizer(vocoder)
    size = CROP * FRAME
    if fresh:
        warm_up(vocoder)
        start(encoder, crops(waves, lengths, numbers, count, size, random)[0])
    clock = clock_of(optimizer, {"encoder": encoder, "code2wav": vocoder})
    vocoder.train()
    ear.requires_grad_(False)

    def learn(_: dict[str, Tensor], plain: bool = False) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        real, first, alone = crops(waves, lengths, numbers, count, size, random)
        exact = encoder(real)
        codes, states, pull = quantizer(exact, learn=not plain)
        made = speak(vocoder, exact if plain else states)
        # The loudness that a recording begins with is its crop's.
        real = real[:, : made.shape[1]]
        distance = difference(made, real)
        low, real_low = lowered(made), lowered(real)
        bands, heard = compare(ear, low, real_low)
        # Where a crop begins with a recording, the ear must hear its digit.
        ends = lengths[first][:, None] // 3 * 2
        within = torch.arange(low.shape[1], device=device)[None] < ends
        logits, _ = ear(ear.bands(low * within))
        named = F.cross_entropy(logits, digits[first], reduction="none")
        named = (named * alone).sum() / alone.sum().clamp(min=1)
        loss = distance + BANDS_WEIGHT * bands + HEARD_WEIGHT * heard + NAMED_WEIGHT * named
        # Books that nothing reads yet would pull all sounds to the few codes that lie nearest to nothing.
        loss = loss + (drift(exact) if plain else 0.5 * pull)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        values = {"spectral": distance, "pull": pull, "bands": bands, "heard": heard, "named": named}
        for name, group in (("bits first", 0), ("bits last", quantizer.count - 1)):
            used = torch.zeros_like(quantizer.used[0])
            used = used.index_add_(0, codes[:, group].flatten(), torch.ones_like(exact[..., 0]).flatten())
            shares = used / used.sum()
            values[name] = -(shares * shares.clamp(min=1e-9).log2()).sum()
        # What still holds on to this step's backward pass would bind the recorded one to this stream.
        return {name: value.detach() for name, value in values.items()}

    def start_quantizer() -> None:
        start_books(quantizer, encoder, crops(waves, lengths, numbers, 8 * count, size, random)[0])

    step = Step(learn, device, capture)
    plain, smoothed = fresh and clock.step == 0, 2 * CLEAR
    if fresh and 0 < clock.step < MOST_PLAIN:
        # An interrupted run does not know whether it had begun to quantize.
        start_quantizer()
    for number in clock:
        if plain:
            values = learn({}, plain=True)
            smoothed += 0.1 * (values["spectral"].item() - smoothed)
            if (number >= LEAST_PLAIN and smoothed < CLEAR) or number >= MOST_PLAIN:
                plain = False
                clock.log(f"codec: quantizes from step {number + 1} on, spectral {smoothed:.3f}")
                start_quantizer()
        else:
            values = step({})
        if clock.tell:
            clock.say(values)
    vocoder.eval()
    encoder.eval()
    clock.done()


@torch.no_grad()
def start_books(quantizer: Quantizer, encoder: Encoder, waves: Tensor, rounds: int = 10) -> None:
    """Sets the code books to k-means of what the encoder gives, group after group."""
    left = encoder(waves)
    left = left.reshape(-1, left.shape[-1]) * quantizer.count
    for group, book in enumerate(quantizer.books()):
        centres = left[torch.randperm(len(left), device=left.device)[torch.arange(quantizer.size) % len(left)]]
        for _ in range(rounds):
            nearest = torch.cdist(left, centres).argmin(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, left)
            counts = torch.zeros_like(centres[:, 0]).index_add_(0, nearest, torch.ones_like(left[:, 0]))
            centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
        book.copy_(centres)
        left = left - centres[torch.cdist(left, centres).argmin(1)]
        quantizer.used[group].fill_(1.0)


def crops(
    waves: Tensor, lengths: Tensor, numbers: Tensor, count: int, size: int, random: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows over recordings that follow one another with short pauses; half of them begin with a recording.

    Returns:
        ``(count, size)``; the first recording of each, ``(count,)``; and whether it begins there and ends inside.
    """
    device = waves.device
    place = torch.arange(size, device=device)[None].expand(count, -1)
    begin = torch.zeros(count, 1, dtype=torch.long, device=device)
    result = torch.zeros(count, size, device=device)
    pick = numbers[torch.randint(len(numbers), (4, count), generator=random, device=device)]
    gain = 10 ** (torch.rand(count, 1, generator=random, device=device) * 0.6 - 0.4)
    late = torch.rand(count, 1, generator=random, device=device) < 0.5
    for number, one in enumerate(pick):
        length = lengths[one][:, None]
        if number == 0:
            share = torch.rand(count, 1, generator=random, device=device)
            begin = torch.where(late, -(share * length).long(), begin)
        index = place - begin
        inside = (index >= 0) & (index < length)
        result = torch.where(inside, torch.gather(waves[one], 1, index.clamp(0, waves.shape[1] - 1)), result)
        pause = (torch.rand(count, 1, generator=random, device=device) * 0.15 * SPEAKING).long()
        # Whole frames, as the talker's targets are put together.
        begin = torch.where(
            late, begin + length + pause, -(-(begin + length) // FRAME) * FRAME + pause // FRAME * FRAME
        )
    whole = ~late[:, 0] & (lengths[pick[0]] < size)
    return (result * gain).clamp(-1, 1), pick[0], whole


@torch.no_grad()
def codes_of(encoder: Encoder, vocoder: Any, data: Data, numbers: Any) -> list[Any]:
    """Codes of recordings, each ``(frames, groups)``, uint16; the last frame is the silence behind it."""
    device = vocoder.device
    waves, lengths = bank(data, SPEAKING, device)
    quantizer = Quantizer(vocoder)
    result: list[Any] = []
    numbers = torch.as_tensor(numbers)
    frames = (lengths.cpu()[numbers] + FRAME - 1) // FRAME + 1
    longest = int(frames.max()) * FRAME
    for some in torch.arange(len(numbers)).split(256):
        padded = F.pad(waves[numbers[some].to(device)], (0, max(0, longest - waves.shape[1])))[:, :longest]
        codes = quantizer(encoder(padded))[0].cpu()
        result += [one[:, : int(frames[at])].T.numpy().astype(np.uint16) for one, at in zip(codes, some, strict=True)]
    return result


@torch.no_grad()
def clearness(ear: Ear, vocoder: Any, data: Data, codes: dict[int, Any]) -> dict[int, float]:
    """How sure the ear is of the digit that recordings say after they went through the codec, by their number."""
    result: dict[int, float] = {}
    by_length: dict[int, list[int]] = {}
    for number, one in codes.items():
        by_length.setdefault(len(one), []).append(number)
    for numbers in by_length.values():
        together = torch.from_numpy(np.stack([codes[number] for number in numbers]).astype(np.int64))
        waves = vocoder(together.transpose(1, 2).to(vocoder.device))[:, 0].float()
        waves = F.pad(waves, (0, -waves.shape[1] % 3))
        sure = ear(ear.bands(lowered(waves)))[0].log_softmax(-1).cpu()
        for number, one in zip(numbers, sure, strict=True):
            result[number] = float(one[int(data.wave_digits[number])])
    return result


@torch.no_grad()
def silence(encoder: Encoder, vocoder: Any) -> Any:
    """Codes of a frame of silence, ``(groups,)``."""
    waves = torch.zeros(1, 4 * FRAME, device=vocoder.device)
    return Quantizer(vocoder)(encoder(waves))[0][0, :, 2].cpu().numpy().astype(np.uint16)
