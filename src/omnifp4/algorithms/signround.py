"""SignRound: offsets of the rounding are learned by the sign of their gradient.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (arXiv 2309.05516). Each value gets an offset in
[-0.5, 0.5], in units of the distance between the two codes around it. The loss is the error of the linear's own outputs
(`signround`), or that of the outputs of whatever its values are put into (`signround_together`), such as a decoder layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from omnifp4.algorithms.grid import Codes, column_scale
from omnifp4.formats.nvfp4 import E2M1_MAGNITUDES

STEPS: Final = 200
LARGEST_OFFSET: Final = 0.5

LOOKS: Final = 10
"""How often `signround_together` looks at the loss over all samples; between these it sees the samples of single steps."""


class Whole(ABC):
    """What rounded weights are put into, and what is to change little."""

    @abstractmethod
    def put(self, name: str, weight: Tensor) -> None:
        """Put a rounded weight, float32 ``[out, in]``, in its place."""

    @abstractmethod
    def loss(self) -> float:
        """Over all samples, with the weights that were put."""

    @abstractmethod
    def gradients(self, step: int) -> Mapping[str, Tensor]:
        """Of the loss over some samples by the weights that were put, shaped alike, in any dtype, for a step by its number.

        Those that these samples do not reach are left out.
        """


class Rounding:
    """A weight between the codes below and above each of its values."""

    def __init__(self, weight: Tensor, block_scale: Tensor, tensor_scale: Tensor) -> None:
        """Takes a weight float32 ``[..., out, in]`` and its scales as `signround` does; offsets are zero."""
        self._block_scale, self._tensor_scale = block_scale, tensor_scale
        scale = column_scale(block_scale, tensor_scale)
        wanted = weight / scale
        magnitudes = torch.from_numpy(E2M1_MAGNITUDES).to(weight.device)
        size = wanted.abs()
        self._below = (torch.bucketize(size, magnitudes, right=True) - 1).clamp_(0, 7).to(torch.uint8)
        self._above = (self._below + 1).clamp_(max=7)
        distance = magnitudes[self._above.int()] - magnitudes[self._below.int()]
        # Where between its two codes a value lies; beyond the last code there is but one.
        self._place = torch.where(
            distance > 0,
            (size - magnitudes[self._below.int()]) / distance.clamp(min=0.5),
            torch.zeros_like(size),
        )
        sign = torch.where(wanted < 0, -1.0, 1.0)
        self._negative = torch.signbit(wanted)
        self.low, self.high = (magnitudes[code.int()] * sign * scale - weight for code in (self._below, self._above))
        self._slope = (distance * sign).sign()
        self.offset = torch.zeros_like(weight)

    def up(self) -> Tensor:
        """Which values are rounded away from zero now: bool ``[..., out, in]``; ties go to the even code."""
        moved = self._place + self.offset
        return (moved > LARGEST_OFFSET) | ((moved == LARGEST_OFFSET) & (self._above % 2 == 0))

    def difference(self, up: Tensor) -> Tensor:
        """Of the rounded values from the weight, float32 ``[..., out, in]``."""
        return torch.where(up, self.high, self.low)

    def step(self, gradient: Tensor, rate: float) -> None:
        """Move the offsets against the gradient of a loss by the rounded values.

        The derivative of a rounded value by its offset is taken as that of the value before rounding.
        """
        turned = gradient.sign().to(self.offset) * self._slope
        self.offset = (self.offset - rate * turned).clamp_(-LARGEST_OFFSET, LARGEST_OFFSET)

    def codes(self, up: Tensor) -> Codes:
        """What is stored."""
        chosen = torch.where(up, self._above, self._below) + 8 * self._negative.to(torch.uint8)
        return Codes(chosen, self._block_scale, self._tensor_scale)


def signround(
    weight: Tensor, hessian: Tensor, block_scale: Tensor, tensor_scale: Tensor, *, steps: int = STEPS
) -> Codes:
    """Round a weight up or down so that its outputs change little.

    Args:
        weight: float32 ``[..., out, in]``.
        hessian: ``E[x x']``, float32 ``[..., in, in]``.
        block_scale: E4M3 bits, uint8 ``[..., out, in / 16]``.
        tensor_scale: float32 ``[...]``.
        steps: of the descent; each is ``1 / steps``, falling to zero.

    Returns:
        For each output the best codes of all steps, never worse on `hessian` than rounding to the nearest.
    """
    rounding = Rounding(weight, block_scale, tensor_scale)
    best: Tensor | None = None
    best_error = torch.full(weight.shape[:-1], torch.inf, device=weight.device)
    for number in range(steps + 1):
        up = rounding.up()
        difference = rounding.difference(up)
        pushed = difference @ hessian
        error = (pushed * difference).sum(dim=-1)
        wins = error < best_error
        best_error = torch.where(wins, error, best_error)
        best = up if best is None else torch.where(wins[..., None], up, best)
        if number < steps:
            rounding.step(pushed, (1 - number / steps) / steps)
    assert best is not None
    return rounding.codes(best)


def signround_together(
    roundings: Mapping[str, tuple[Tensor, Rounding]],
    whole: Whole,
    *,
    steps: int = STEPS,
    tell: Callable[[int], object] = lambda _: None,
) -> tuple[dict[str, Codes], float, float]:
    """Round weights up or down so that the whole that they are in changes little.

    Args:
        roundings: by name, each weight, float32 ``[out, in]``, and its rounding.
        whole: see `Whole`; afterwards it holds the weights of the last step.
        steps: of the descent; each is ``1 / steps``, falling to zero.
        tell: called with the steps that are done.

    Returns:
        The codes of least loss among rounding to the nearest and `LOOKS` looks after it; the loss of that, and of
        these.
    """
    looks = {round(steps * look / LOOKS) for look in range(LOOKS + 1)}
    best: dict[str, Tensor] = {}
    first = best_loss = float("inf")
    for number in range(steps + 1):
        ups = {name: rounding.up() for name, (_, rounding) in roundings.items()}
        for name, (weight, rounding) in roundings.items():
            whole.put(name, weight + rounding.difference(ups[name]))
        if number in looks:
            loss = whole.loss()
            first = loss if number == 0 else first
            if loss < best_loss or not best:
                best, best_loss = ups, loss
        if number < steps:
            for name, gradient in whole.gradients(number).items():
                roundings[name][1].step(gradient, (1 - number / steps) / steps)
            tell(number + 1)
    return {name: rounding.codes(best[name]) for name, (_, rounding) in roundings.items()}, first, best_loss
