"""Stage: the vision tower again, the rest of the thinker fixed, with what keeps it from learning 1,438 pictures by heart.

The digits are few. A tower that is trained end to end reads all of them, and 94 % of the held-out ones; a Gaussian
kernel on the 8 x 8 pixels has no pictures to memorise features with and reads 99 %. So the kernel teaches: it names what
lies between the training pictures (two of them mixed, slightly turned and moved), where the tower had nothing to learn
from. Nothing is chosen by held-out pictures: the kernel's width and ridge by leave-one-out on the training part, the
stage's weights are the running mean at its end.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.conversations import PICTURE, SYSTEMS, Author, Picture, Piece, positions
from training.data import Data
from training.pictures import PATCH, draw, patches
from training.thinker import autocast, decode
from training.towers import Sight, tower_of

WIDTHS = (1.5, 2.0, 2.5, 3.0)
"""Standard deviations of the kernel, in ink of an 8 x 8 picture."""
RIDGES = (1e-2, 1e-1)
SHARPNESS = 8.0
"""Times the kernel's scores, which are near 0 and 1, before the softmax."""
SIDES = (4, 4, 4, 6, 8)
"""Patches on the sides of the canvases, one of these in a batch."""
MEAN_STEPS = 40
"""The running mean of the weights forgets over so many steps."""


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
        squares = torch.cdist(pictures.flatten(1), self.pictures).square()
        scores = torch.exp(-squares / (2 * self.width * self.width)) @ self.weights
        return torch.softmax(SHARPNESS * scores, dim=-1)


def between(pictures: Tensor, digits: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Pictures between training pictures: one as it is, two of the same digit mixed, or any two; half of them moved.

    Args:
        pictures: ``(n, 8, 8)`` in [0, 1].
        digits: ``(n,)``.
        count: how many to make.
        random: on the pictures' device.

    Returns:
        ``(count, 8, 8)`` in [0, 1].
    """
    device = pictures.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=random, device=device) * (high - low) + low

    one = torch.randint(len(pictures), (count,), generator=random, device=device)
    likely = torch.rand(count, len(pictures), generator=random, device=device)
    alike = torch.where(digits[one][:, None] == digits[None], likely, 0.0).argmax(1)
    other = likely.argmax(1)
    kind = uniform(0, 1)
    second = torch.where(kind < 0.75, alike, other)
    share = torch.where(kind < 0.25, 0.0, torch.where(kind < 0.75, uniform(0, 1), uniform(0, 0.5)))[:, None, None]
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


def shown(digits: Tensor, side: int, random: torch.Generator) -> Tensor:
    """Draws digits: two fifths with all variation, the others as a scaled-up file, in blocks or smooth.

    Args:
        digits: ``(n, 8, 8)``.
        side: patches on each side of the canvas.

    Returns:
        ``(n, 3, 16 side, 16 side)`` in [0, 1].
    """
    count, pixels, device = len(digits), side * PATCH, digits.device
    size = torch.full((count,), side, device=device)
    varied = draw(digits, size, size, True, random, pixels)
    blocky = draw(digits, size, size, False, None, pixels)
    smooth = F.interpolate(digits[:, None], size=(pixels, pixels), mode="bicubic", antialias=False).clamp(0, 1)
    kind = torch.rand(count, 1, 1, 1, generator=random, device=device)
    plain = torch.where(kind < 0.7, blocky, smooth.expand(-1, 3, -1, -1))
    inverted = torch.rand(count, 1, 1, 1, generator=random, device=device) < 0.2
    return torch.where(kind < 0.4, varied, torch.where(inverted, 1 - plain, plain))


def asked(author: Author, side: int) -> tuple[list[int], Any, int]:
    """A question about one picture: token ids, positions ``(3, tokens)``, where the picture's tokens begin."""
    count = side * side // 4
    before, after = author.around_picture
    medium = Piece([author.picture_token] * count, "picture", Picture(0, side, side))
    media = [Piece([before]), medium, Piece([after])]
    content = author.mixed(media, author.say(author.random.choice(PICTURE)))
    pieces = [Piece([author.start, *author.encode("user\n")]), *content]
    if author.random.random() < 0.3:
        text = author.random.choice(SYSTEMS)
        pieces.insert(0, Piece([author.start, *author.encode("system\n" + text), author.end, *author.encode("\n")]))
    pieces.append(Piece([author.end, *author.encode("\n"), author.start, *author.encode("assistant\n")]))
    flat = [token for piece in pieces for token in piece.ids]
    return flat, positions(pieces), flat.index(author.picture_token)


def answer(thinker: Any, sight: Sight, pictures: Tensor, author: Author, side: int) -> Tensor:
    """Logits of the answer's first token, ``(n, vocabulary)``, to one question about each picture."""
    ids, places, first = asked(author, side)
    count, device = len(pictures), pictures.device
    size = torch.full((count,), side, device=device)
    features, levels, _ = sight(patches(pictures), size, size)
    states = thinker.get_input_embeddings()(torch.tensor(ids, device=device)).expand(count, -1, -1)
    behind = len(ids) - first - features.shape[1]

    def placed(values: Tensor) -> Tensor:
        return F.pad(values, (0, 0, first, behind))

    none = torch.ones_like(features[:, :, :1])
    states = states * (1 - placed(none)) + placed(features)
    where = torch.from_numpy(places).to(device)[:, None].expand(-1, count, -1)
    states = decode(thinker.get_decoder(), states, where, [placed(level) for level in levels])
    logits: Tensor = thinker.lm_head(states[:, -1])
    return logits


def train(model: Any, data: Data, author: Author, clock_of: Any, seed: int, count: int, log: Any) -> None:
    """Trains the vision tower.

    Args:
        model: the whole model; only its vision tower changes.
        data: pictures.
        author: for the questions, of the training part.
        clock_of: a function from ``(optimizer, modules)`` to a `Clock`.
        seed: of pictures and their variation.
        count: pictures in a batch.
        log: a function that prints one line.
    """
    from training.architecture import groups

    thinker = model.thinker
    device = thinker.device
    tower = tower_of(thinker, "visual")
    teacher = Teacher(data, device)
    log(
        f"eye: the kernel of width {teacher.width}, ridge {teacher.ridge} names {teacher.accuracy:.2%} of the training"
        " pictures from the others"
    )
    numbers = data.picture_numbers(False)
    pictures = torch.from_numpy(data.pictures[numbers]).to(device)
    digits = torch.from_numpy(data.picture_digits[numbers]).to(device)
    names = torch.tensor([author.number(digit)[0][0] for digit in range(10)], device=device)
    thinker.requires_grad_(False)
    tower.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups(tower, 0.05), lr=1e-3, betas=(0.9, 0.98))
    mean = copy.deepcopy(tower)
    clock = clock_of(optimizer, {"tower": tower, "mean": mean})
    random = torch.Generator(device).manual_seed(seed * 1000 + clock.step)
    sights = {side: Sight(tower, side) for side in set(SIDES)}
    for _ in clock:
        side = author.random.choice(SIDES)
        made = between(pictures, digits, count, random)
        wanted = teacher(made)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            logits = answer(thinker, sights[side], shown(made, side, random), author, side)
        told = logits.float().log_softmax(-1)[:, names]
        loss = -(wanted * told).sum(-1).mean()
        least = -(wanted * wanted.clamp(min=1e-9).log()).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(mean.parameters(), tower.parameters(), strict=True):
                old.lerp_(new, 1 / min(MEAN_STEPS, clock.step + 1))
        if clock.tell:
            agreed = (told.argmax(1) == wanted.argmax(1)).float().mean()
            clock.say({"divergence": loss - least, "agreed": agreed})
    tower.load_state_dict(mean.state_dict())
    thinker.requires_grad_(True)
    clock.done()
