"""The kernel that teaches the vision tower, and the pictures between pictures that it names.

The digits are few: a tower that is trained on 1,438 pictures learns them by heart. A Gaussian kernel on the 8 x 8 pixels has
no features to memorise with, and reads pictures that it was not made from better. So it names what lies between the training
pictures, where the tower would have nothing to learn from. Its width and ridge are chosen by leave-one-out on the training part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.data import Data

WIDTHS = (1.5, 2.0, 2.5, 3.0)
"""Standard deviations of the kernel, in ink of an 8 x 8 picture."""
RIDGES = (1e-2, 1e-1)
SHARPNESS = 8.0
"""Times the kernel's scores, which are near 0 and 1, before the softmax."""


class Teacher:
    """Kernel ridge regression of the digit on the 8 x 8 pixels of the training pictures.

    Args:
        data: pictures; only the training part is read.
        device: where it runs.

    Attributes:
        width, ridge: of the kernel, the best by leave-one-out.
        accuracy: share of training pictures named rightly by the others.
    """

    def __init__(self, data: Data, device: Any) -> None:
        numbers = data.picture_numbers(False)
        self.pictures = torch.from_numpy(data.pictures[numbers]).flatten(1).double()
        digits = torch.from_numpy(data.picture_digits[numbers])
        wanted = F.one_hot(digits, 10).double()
        self.accuracy = -1.0
        squares = torch.cdist(self.pictures, self.pictures).square()
        for width in WIDTHS:
            kernel = torch.exp(-squares / (2 * width * width))
            for ridge in RIDGES:
                inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel), dtype=torch.float64))
                weights = inverse @ wanted
                # What the others say of each: leaving one out has this closed form.
                alone = wanted - weights / inverse.diagonal()[:, None]
                accuracy = float((alone.argmax(1) == digits).double().mean())
                if accuracy > self.accuracy:
                    self.accuracy, self.width, self.ridge, self.weights = accuracy, width, ridge, weights
        self.pictures, self.weights = self.pictures.float().to(device), self.weights.float().to(device)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Shares of the ten digits, ``(n, 10)``, for ``(n, 8, 8)`` in [0, 1]."""
        # Not as matrix products, which a GPU may round to ten bits.
        exact = "donot_use_mm_for_euclid_dist"
        squares = torch.cdist(pictures.flatten(1), self.pictures, compute_mode=exact).square()
        kernel = torch.exp(-squares / (2 * self.width * self.width))
        scores = (kernel[:, :, None] * self.weights).sum(1)
        return torch.softmax(SHARPNESS * scores, dim=-1)


class Album:
    """Training pictures, and pictures between them.

    Args:
        data: only the training part is read.
        device: where it is.
    """

    def __init__(self, data: Data, device: Any) -> None:
        numbers = data.picture_numbers(False)
        self.pictures = torch.from_numpy(data.pictures[numbers]).to(device)
        self.digits = torch.from_numpy(data.picture_digits[numbers]).to(device)
        places = torch.zeros(len(data.pictures), dtype=torch.long)
        places[torch.from_numpy(numbers)] = torch.arange(len(numbers))
        self.places = places.to(device)
        """Where a picture of the data stands here, by its number."""

    def between(self, one: Tensor, free: Tensor, random: torch.Generator) -> Tensor:
        """Pictures as they are, mixed with another of the same digit or, where they may, with any; half of them moved.

        Args:
            one: where each begins, ``(n,)`` places in the album.
            free: which may be mixed with another digit, ``(n,)``; the others keep theirs.
            random: on the album's device.

        Returns:
            ``(n, 8, 8)`` in [0, 1].
        """
        pictures, digits, count = self.pictures, self.digits, len(one)

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(count, generator=random, device=pictures.device) * (high - low) + low

        likely = torch.rand(count, len(pictures), generator=random, device=pictures.device)
        alike = torch.where(digits[one][:, None] == digits[None], likely, 0.0).argmax(1)
        kind = uniform(0, 1)
        other = (kind >= 0.75) & free
        second = torch.where(other, likely.argmax(1), alike)
        share = torch.where(kind < 0.25, 0.0, torch.where(other, uniform(0, 0.5), uniform(0, 1)))[:, None, None]
        mixed = pictures[one] * (1 - share) + pictures[second] * share
        still = uniform(0, 1) < 0.5
        turn, slant, down, right = (torch.where(still, 0.0, uniform(-reach, reach)) for reach in (0.15, 0.15, 0.1, 0.1))
        high, wide = (torch.where(still, 1.0, uniform(0.92, 1.08)) for _ in range(2))
        rows = torch.stack(
            [
                torch.stack([wide * turn.cos(), slant - turn.sin(), right], dim=-1),
                torch.stack([turn.sin(), high * turn.cos(), down], dim=-1),
            ],
            dim=1,
        )
        grid = F.affine_grid(rows, [count, 1, 8, 8], align_corners=False)
        moved = F.grid_sample(mixed[:, None], grid, align_corners=False)[:, 0]
        return torch.where(still[:, None, None], mixed, moved).clamp(0, 1)
