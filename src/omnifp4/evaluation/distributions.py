"""Next-token distributions of the reference, kept small enough to be cached, and how far others are from them.

All arithmetic on logits is in float64: their dtype is the model's, and a divergence of 1e-6 must not drown in rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FULL_VOCABULARY: Final = 16_384
"""Vocabularies up to this size are kept whole."""
KEPT: Final = 2_048
"""Of larger ones, so many of the likeliest tokens of the reference are kept, and the rest as one sum."""
POSITIONS_AT_ONCE: Final = 32
"""78 MB in float64 with the released vocabulary, a few times over."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distributions:
    """Of one sample at its scored positions.

    Attributes:
        log_probabilities: float32 ``[n, kept]``.
        tokens: int32 ``[n, kept]``, which tokens these are; None: all, in order.
        log_rest: float32 ``[n]``: log of what the other tokens share; ``-inf`` where there are none.
        likeliest: int64 ``[n]``.
        log_target: float64 ``[n]``: of the token that follows.
        finite: bool ``[n]``: no logit is NaN or infinite.
    """

    log_probabilities: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32] | None
    log_rest: npt.NDArray[np.float32]
    likeliest: npt.NDArray[np.int64]
    log_target: Floats
    finite: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """One side against the reference, at the scored positions of one sample.

    Attributes:
        kl: float64 ``[n]``, nats; NaN where not finite.
        agrees: bool ``[n]``: the likeliest token is the reference's.
        right: bool ``[n]``: the likeliest token is the one that follows.
        log_target: float64 ``[n]``: log probability of the one that follows.
        finite: bool ``[n]``.
    """

    kl: Floats
    agrees: npt.NDArray[np.bool_]
    right: npt.NDArray[np.bool_]
    log_target: Floats
    finite: npt.NDArray[np.bool_]


def kept_of(vocabulary: int) -> str:
    """In words, what of a vocabulary the divergence sees."""
    if vocabulary <= FULL_VOCABULARY:
        return "full"
    return f"the reference's {KEPT:,} likeliest tokens and the sum of the rest, which bounds the divergence from below"


def summarise(logits: Tensor, targets: Tensor) -> Distributions:
    """Keep what later comparisons need.

    Args:
        logits: ``[n, vocabulary]``, any float dtype and device.
        targets: int64 ``[n]``.
    """
    pieces = [
        _summarise(logits[begin : begin + POSITIONS_AT_ONCE], targets[begin : begin + POSITIONS_AT_ONCE])
        for begin in range(0, logits.shape[0], POSITIONS_AT_ONCE)
    ]
    return join_distributions(pieces)


def compare(reference: Distributions, logits: Tensor, targets: Tensor) -> Scores:
    """Divergence of the reference from this side, position by position.

    Args:
        reference: at the same positions.
        logits: ``[n, vocabulary]`` of the side that is judged.
        targets: int64 ``[n]``.
    """
    pieces = []
    for begin in range(0, logits.shape[0], POSITIONS_AT_ONCE):
        here = slice(begin, begin + POSITIONS_AT_ONCE)
        pieces.append(_compare(_cut(reference, here), logits[here], targets[here]))
    return join_scores(pieces)


def _summarise(logits: Tensor, targets: Tensor) -> Distributions:
    finite, logs = _log_softmax(logits)
    likeliest = logits.argmax(dim=-1)
    log_target = logs.gather(1, targets.to(logs.device)[:, None])[:, 0]
    tokens = None
    log_rest = torch.full_like(log_target, -torch.inf)
    if logs.shape[1] > FULL_VOCABULARY:
        kept, places = logs.topk(KEPT, dim=-1)
        others = logs.scatter(1, places, -torch.inf)
        log_rest = others.logsumexp(dim=-1)
        tokens, logs = places.to(torch.int32).cpu().numpy(), kept
    return Distributions(
        logs.float().cpu().numpy(),
        tokens,
        log_rest.float().cpu().numpy(),
        likeliest.cpu().numpy(),
        log_target.cpu().numpy(),
        finite.cpu().numpy(),
    )


def _compare(reference: Distributions, logits: Tensor, targets: Tensor) -> Scores:
    finite, logs = _log_softmax(logits)
    device = logs.device
    known = torch.from_numpy(reference.log_probabilities).to(device, torch.float64)
    # What was rounded to float32 is a distribution again.
    log_rest = torch.from_numpy(reference.log_rest).to(device, torch.float64)
    whole = torch.cat([known, log_rest[:, None]], dim=1).logsumexp(dim=-1)
    known, log_rest = known - whole[:, None], log_rest - whole
    rest = torch.zeros_like(log_rest)
    mine = logs
    if reference.tokens is not None:
        places = torch.from_numpy(reference.tokens).to(device, torch.int64)
        mine = logs.gather(1, places)
        my_rest = logs.scatter(1, places, -torch.inf).logsumexp(dim=-1)
        rest = torch.where(log_rest.isneginf(), rest, log_rest.exp() * (log_rest - my_rest))
    # Rounding can take a divergence of nothing below zero, which it cannot be.
    kl = ((known.exp() * (known - mine)).sum(dim=-1) + rest).clamp(min=0)
    both = finite.cpu().numpy() & reference.finite
    likeliest = logits.argmax(dim=-1).cpu().numpy()
    log_target = logs.gather(1, targets.to(device)[:, None])[:, 0].cpu().numpy()
    return Scores(
        np.where(both, kl.cpu().numpy(), np.nan),
        likeliest == reference.likeliest,
        likeliest == targets.cpu().numpy(),
        np.where(both, log_target, np.nan),
        both,
    )


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    finite = logits.isfinite().all(dim=-1)
    return finite, logits.to(torch.float64).log_softmax(dim=-1)


def _cut(found: Distributions, here: slice) -> Distributions:
    tokens = None if found.tokens is None else found.tokens[here]
    return Distributions(
        found.log_probabilities[here], tokens, found.log_rest[here], found.likeliest[here], found.log_target[here],
        found.finite[here],
    )  # fmt: skip


def join_distributions(pieces: list[Distributions]) -> Distributions:
    """Pieces of one sample, one behind the other."""
    tokens = [piece.tokens for piece in pieces if piece.tokens is not None]
    return Distributions(
        np.concatenate([piece.log_probabilities for piece in pieces]),
        np.concatenate(tokens) if tokens else None,
        np.concatenate([piece.log_rest for piece in pieces]),
        np.concatenate([piece.likeliest for piece in pieces]),
        np.concatenate([piece.log_target for piece in pieces]),
        np.concatenate([piece.finite for piece in pieces]),
    )


def join_scores(pieces: list[Scores]) -> Scores:
    """Pieces of one sample, one behind the other."""
    return Scores(
        np.concatenate([piece.kl for piece in pieces]),
        np.concatenate([piece.agrees for piece in pieces]),
        np.concatenate([piece.right for piece in pieces]),
        np.concatenate([piece.log_target for piece in pieces]),
        np.concatenate([piece.finite for piece in pieces]),
    )
