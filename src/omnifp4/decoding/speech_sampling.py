"""Drawing codes on the device: the steps of ``generate()`` in its order, without a word to the host.

Transformers' own processors build their masks from lists at every call and `torch.multinomial` may ask the host, so
neither fits in a CUDA graph. Here all that changes between two frames is a tensor. The numbers are the same: on one
device, the same seed draws the same codes as ``generate()`` does after `torch.manual_seed`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CodeSampling:
    """How codes are chosen.

    Attributes:
        greedy: take the likeliest; the other values but the penalty then count for nothing.
        temperature: divides the logits.
        top_k: candidates; 0 for all.
        top_p: nucleus; 1 for all.
        repetition_penalty: above 1 discourages codes that were there.
    """

    greedy: bool
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def penalise(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Weakens what was there.

    Args:
        scores: float32 ``[1, vocabulary]``.
        seen: bool, same shape.
        penalty: float32 ``[]``.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """All but the `top_k` highest become -inf; equals of the last stay. ``[1, vocabulary]``."""
    least = torch.topk(scores, min(top_k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """All but the likeliest, of which the mass reaches `top_p`, become -inf. ``[1, vocabulary]``."""
    ascending, order = torch.sort(scores, descending=False)
    out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    out[..., -1:] = False
    return scores.masked_fill(out.scatter(1, order, out), -torch.inf)


def choose(scores: Tensor, sampling: CodeSampling, temperature: Tensor, generator: torch.Generator) -> Tensor:
    """One code.

    Args:
        scores: float32 ``[1, vocabulary]``, penalised already.
        sampling: what to do; of its values `greedy`, `top_k` and `top_p` are read.
        temperature: float32 ``[]``, on the device, so that a captured graph reads the value of the day.
        generator: on the device of `scores`.

    Returns:
        int64 ``[1, 1]``.
    """
    if sampling.greedy:
        return scores.argmax(-1, keepdim=True)
    scores = scores / temperature
    if sampling.top_k:
        scores = keep_top_k(scores, sampling.top_k)
    if sampling.top_p < 1:
        scores = keep_top_p(scores, sampling.top_p)
    probabilities = scores.softmax(-1)
    # What `torch.multinomial` does for one sample, less its checks, for which it waits.
    noise = torch.empty_like(probabilities).exponential_(1.0, generator=generator)
    return (probabilities / noise).argmax(-1, keepdim=True)
