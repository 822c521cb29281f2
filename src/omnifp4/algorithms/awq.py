"""AWQ: channels whose inputs are large are scaled up before rounding, and down again where the inputs come from.

Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978), with the term for the weights that its released
code has: columns that are small beside their blocks are scaled up, too. The factors here are powers of two: so the
fold into what comes before, and into every other reader of it that stays wide (the router, above all), is exact in
BF16, and the model before rounding computes bit for bit what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from omnifp4.algorithms.errors import error_under
from omnifp4.algorithms.grid import blocks_of

ALPHAS: Final = tuple(step / 10 for step in range(11))
"""Exponents that are tried, beside no factors at all."""

LARGEST_STEP: Final = 6
"""Factors lie between ``2**-6`` and ``2**6``."""

Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From a scaled weight ``[out, in]``, the factors ``[in]`` and the reader's Hessian to what its codes stand for."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A weight that is rounded and reads the channels that are scaled.

    Attributes:
        weight: float32 ``[out, in]``; weights of one kernel may stand over each other.
        hessian: ``E[x x']``, float32 ``[in, in]``, or its blocks ``[in / 16, 16, 16]``.
        share: how much its error counts: tokens that it saw, of all.
    """

    weight: Tensor
    hessian: Tensor
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What a search found.

    Attributes:
        factors: powers of two, float32 ``[in]``; inputs are divided by them and weights multiplied.
        alpha: the exponent that gave them; None where nothing was better than no factors.
        error, plain_error: output error with and without.
    """

    factors: Tensor
    alpha: float | None
    error: float
    plain_error: float


def factors_for(abs_mean: Tensor, column_size: Tensor, alpha: float) -> Tensor:
    """The factors of one exponent: ``E|x|**alpha / size**(1 - alpha)``, centred, and rounded to powers of two.

    Args:
        abs_mean: ``E|x|`` of the channels, ``[in]``.
        column_size: of the weights that read them, ``[in]``; see `column_sizes`.
        alpha: from 0, which makes the columns alike, to 1, which makes the inputs alike.

    Returns:
        float32 ``[in]``.
    """
    exponent = alpha * _log2_of_known(abs_mean) - (1 - alpha) * _log2_of_known(column_size)
    exponent = exponent - (exponent.max() + exponent.min()) / 2
    return exponent.round().clamp_(-LARGEST_STEP, LARGEST_STEP).exp2().float()


def column_sizes(weight: Tensor) -> Tensor:
    """Mean magnitude of every column, in units of the largest of its block: ``[out, in]`` to ``[in]``."""
    blocks = blocks_of(weight).abs()
    largest = blocks.amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, blocks / largest, blocks).reshape(weight.shape).mean(dim=0)


def _log2_of_known(size: Tensor) -> Tensor:
    """Zeros count as the median of the others."""
    known = size > 0
    if not bool(known.any()):
        return torch.zeros_like(size, dtype=torch.float64)
    return torch.where(known, size, size[known].median()).double().log2()


def search_smoothing(
    readers: Iterable[Reader],
    abs_mean: Tensor,
    column_size: Tensor,
    rounding: Rounding,
    *,
    alphas: Sequence[float] = ALPHAS,
) -> Smoothing:
    """The factors that make the outputs of all readers err least, together.

    Args:
        readers: everything that is rounded and reads these channels; taken one after another, so that one is in memory.
        abs_mean: ``E|x|`` of the channels, ``[in]``.
        column_size: of all these weights, ``[in]``; see `column_sizes`.
        rounding: how a scaled weight is rounded.
        alphas: exponents to be tried, beside no factors at all.
    """
    plain = torch.ones_like(abs_mean, dtype=torch.float32)
    tried: dict[bytes, tuple[float | None, Tensor]] = {plain.cpu().numpy().tobytes(): (None, plain)}
    for alpha in sorted(set(alphas)):
        factors = factors_for(abs_mean, column_size, alpha)
        tried.setdefault(factors.cpu().numpy().tobytes(), (alpha, factors))
    errors = [0.0] * len(tried)
    for reader in readers:
        for number, (_, factors) in enumerate(tried.values()):
            moved = factors.to(reader.weight.device)
            difference = rounding(reader.weight * moved, moved, reader.hessian) / moved - reader.weight
            errors[number] += reader.share * float(error_under(difference, reader.hessian))
    best = min(range(len(errors)), key=errors.__getitem__)
    exponent, chosen = list(tried.values())[best]
    return Smoothing(chosen, exponent, errors[best], errors[0])
