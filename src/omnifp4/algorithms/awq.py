"""AWQ: channels whose inputs are large are scaled up before rounding, and down again where the inputs come from.

Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978). The factors here are powers of two: so the
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

ALPHAS: Final = tuple(step / 10 for step in range(11))
"""Exponents that are tried; 0 changes nothing."""

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
        alpha: the exponent that gave them; 0 where nothing was better than no factors.
        error, plain_error: output error with and without.
    """

    factors: Tensor
    alpha: float
    error: float
    plain_error: float


def factors_for(abs_mean: Tensor, alpha: float) -> Tensor:
    """The factors of one exponent: ``E|x|**alpha``, centred, and rounded to powers of two. ``[in]`` to float32 ``[in]``."""
    size = abs_mean.double()
    known = size > 0
    if alpha == 0 or not bool(known.any()):
        return torch.ones_like(abs_mean, dtype=torch.float32)
    exponent = alpha * torch.where(known, size, size[known].median()).log2()
    exponent = exponent - (exponent.max() + exponent.min()) / 2
    return exponent.round().clamp_(-LARGEST_STEP, LARGEST_STEP).exp2().float()


def search_smoothing(
    readers: Iterable[Reader], abs_mean: Tensor, rounding: Rounding, *, alphas: Sequence[float] = ALPHAS
) -> Smoothing:
    """The factors that make the outputs of all readers err least, together.

    Args:
        readers: everything that is rounded and reads these channels; taken one after another, so that one is in memory.
        abs_mean: ``E|x|`` of the channels, ``[in]``.
        rounding: how a scaled weight is rounded.
        alphas: exponents to be tried; 0 is always among them.
    """
    tried: dict[bytes, tuple[float, Tensor]] = {}
    for alpha in sorted({0.0, *alphas}):
        factors = factors_for(abs_mean, alpha)
        tried.setdefault(factors.cpu().numpy().tobytes(), (alpha, factors))
    errors = [0.0] * len(tried)
    for reader in readers:
        for number, (_, factors) in enumerate(tried.values()):
            moved = factors.to(reader.weight.device)
            difference = rounding(reader.weight * moved, moved, reader.hessian) / moved - reader.weight
            errors[number] += reader.share * float(error_under(difference, reader.hessian))
    best = min(range(len(errors)), key=errors.__getitem__)
    alpha, factors = list(tried.values())[best]
    return Smoothing(factors, alpha, errors[best], errors[0])
