"""Random weights that look trained: heavy tails, a few outlier channels, and a scale that fits each tensor's role.

A weight is one entry of a 65,536-entry table, chosen by 16 random bits. The table holds the quantiles of Student's t
with 5 degrees of freedom (the tails of trained linears), scaled to the role and rounded to BF16 once; so a tensor costs
one look-up per element, and its bytes depend on the seed and its name only.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod, sqrt

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]
"""BF16 numbers as their bit patterns; numpy has no BF16."""

TABLE_SIZE = 1 << 16
BLOCK = 1 << 16
"""Elements drawn at a time: indices, table and result stay in the processor's cache, which is three times as fast."""

OUTLIER_SHARE = 1 / 64
"""Share of a linear's input channels that are outliers."""
OUTLIER_DOUBLINGS = 2
"""Outlier channels are this many powers of two larger, exact in BF16."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw one tensor.

    Attributes:
        mean: of the elements.
        std: standard deviation of the elements, outlier channels apart.
        outlier_channels: some input channels (columns) are ``2**OUTLIER_DOUBLINGS`` times as large.
    """

    mean: float
    std: float
    outlier_channels: bool = False


# First match counts. A rule gives (pattern, mean, std); a negative std means that many times 1/sqrt(fan_in).
_RULES: tuple[tuple[re.Pattern[str], float, float], ...] = tuple(
    (re.compile(pattern), mean, std)
    for pattern, mean, std in (
        # The layer scale of trained vocoders is small; here it is large enough that every block shapes the sound.
        (r"layer_scale\.scale$|\.gamma$", 0.25, 0.02),
        # Logarithms of frequency and of inverse magnitude of the periodic activation.
        (r"\.(alpha|beta)$", 0.0, 0.2),
        (r"(norm\d?|ln_q|ln_post|layernorm|layer_norm|\.upsample\.\d+\.\d+\.norm)\.weight$", 1.0, 0.08),
        # Twelve residual units in a row: small branches keep the waveform's energy from doubling in each.
        (r"^code2wav\.decoder\.\d+\.block\.\d+\.conv2\.conv\.weight$", 0.0, -0.3),
        # The last convolution sets the loudness, about -20 dB of full scale; a bias would be a constant pressure.
        (r"^code2wav\.decoder\.[1-9]\d*\.conv\.weight$", 0.0, -0.05),
        (r"^code2wav\.decoder\.[1-9]\d*\.conv\.bias$", 0.0, 0.001),
        (r"\.bias$", 0.0, 0.02),
        # Peaked next-token distributions, as trained models have; logits near zero would hide quantization damage.
        (r"lm_head(\.\d+)?\.weight$|codec_head\.weight$", 0.0, -2.5),
        (r"mlp\.gate\.weight$", 0.0, -1.5),
        (r"code_embedding\.weight$", 0.0, 1.0),
        (r"pos_embed\.weight$", 0.0, 0.1),
        (r"(embed_tokens|codec_embedding(\.\d+)?)\.weight$", 0.0, 0.5),
    )
)


def draw_for(name: str, shape: tuple[int, ...], is_linear: bool) -> Draw:
    """Chooses mean, spread and outliers by the tensor's role.

    Args:
        name: checkpoint name.
        shape: of the tensor.
        is_linear: it is the 2-D weight of a linear layer.
    """
    for pattern, mean, std in _RULES:
        if pattern.search(name):
            return Draw(mean, std if std > 0 else -std / sqrt(fan_in(name, shape)))
    return Draw(0.0, 1.0 / sqrt(fan_in(name, shape)), outlier_channels=is_linear)


def fan_in(name: str, shape: tuple[int, ...]) -> float:
    """Number of inputs that one output of the layer sums."""
    if len(shape) == 3 and _TRANSPOSED.search(name):
        # A transposed convolution stores (in, out, kernel); its kernel is one or two strides long.
        return float(shape[0]) * (2 if shape[2] > 2 else 1)
    return float(prod(shape[1:])) if len(shape) > 1 else float(shape[0])


_TRANSPOSED = re.compile(r"^code2wav\.(upsample\.\d+\.0\.conv|decoder\.\d+\.block\.1\.conv)\.weight$")


@lru_cache(maxsize=1)
def unit_quantiles() -> NDArray[np.float64]:
    """Quantiles of Student's t with 5 degrees of freedom at ``(i + 1/2) / 65536``, scaled to unit variance.

    Source: the distribution function for odd degrees of freedom, Abramowitz and Stegun 26.7.3.
    """
    # In the angle atan(t / sqrt(5)) the function is smooth up to its ends, so interpolation inverts it well.
    angle = np.linspace(0.0, np.pi / 2, 1 << 18)
    cosine = np.cos(angle)
    upper = 0.5 + (angle + np.sin(angle) * cosine * (1 + 2 / 3 * cosine**2)) / np.pi
    probability = (np.arange(TABLE_SIZE // 2) + 0.5 + TABLE_SIZE // 2) / TABLE_SIZE
    positive = np.tan(np.interp(probability, upper, angle)) * sqrt(5) / sqrt(5 / 3)
    return np.concatenate([-positive[::-1], positive])


@lru_cache(maxsize=256)
def quantile_table(mean: float, std: float) -> Bits:
    """BF16 bits of ``mean + std * unit_quantiles()``; shape ``(65536,)``, read-only."""
    table = bf16_bits((mean + std * unit_quantiles()).astype(np.float32))
    table.flags.writeable = False
    return table


def bf16_bits(values: NDArray[np.float32]) -> Bits:
    """Rounds finite float32 numbers to BF16, to nearest and ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)


def stream(seed: int, name: str, part: int = 0) -> np.random.Generator:
    """The random numbers of one part of one tensor: the same on every machine and with any number of workers."""
    digest = hashlib.sha256(f"{seed}/{part}/{name}".encode()).digest()
    return np.random.Generator(np.random.SFC64(np.frombuffer(digest, np.uint32).tolist()))


def outlier_channels(seed: int, name: str, width: int) -> NDArray[np.int64]:
    """Input channels of a linear of `width` inputs that are outliers; at least one."""
    order = np.argsort(stream(seed, name, part=-1).random(width), kind="stable")
    return np.sort(order[: max(1, round(width * OUTLIER_SHARE))])


def fill(out: Bits, draw: Draw, seed: int, name: str, part: int = 0) -> None:
    """Fills rows of one tensor.

    Args:
        out: C-contiguous, shape ``(rows, …)``; for a linear ``(rows, in_features)``.
        draw: mean, spread and outliers of the tensor.
        seed: of the checkpoint.
        name: checkpoint name; with `seed` and `part` it fixes the bytes.
        part: number of these rows among the parts that the tensor is cut into.
    """
    table = quantile_table(draw.mean, draw.std)
    random = stream(seed, name, part)
    flat = out.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        words = random.integers(0, 2**64 - 1, size=-(-block.size // 4), dtype=np.uint64, endpoint=True)
        # Little-endian on every machine, so that the bytes are too.
        indices = words.astype("<u8", copy=False).view("<u2")[: block.size]
        # Every index is in range; "wrap" only skips the check.
        np.take(table, indices, out=block, mode="wrap")
    if draw.outlier_channels:
        # The quantiles never are zero or near the ends of the exponent range, so adding to the exponent is exact.
        out[:, outlier_channels(seed, name, out.shape[-1])] += np.uint16(OUTLIER_DOUBLINGS << 7)
