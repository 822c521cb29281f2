"""Stage: the vision tower again, the rest of the thinker fixed, taught by `training.teacher`.

Every picture of a batch is named by the kernel, and the tower learns to let the whole thinker answer so. Nothing is chosen by
held-out pictures: the stage's weights are the running mean at its end.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.conversations import Author, Picture, Piece, positions
from training.data import Data
from training.phrases import PICTURE, SYSTEMS
from training.pictures import PATCH, draw, patches
from training.teacher import Album, Teacher
from training.thinker import autocast, decode
from training.towers import Sight, tower_of

SIDES = (4, 4, 6, 8, 8)
"""Patches on the sides of the canvases, one of these in a batch."""
MEAN_STEPS = 40
"""The running mean of the weights forgets over so many steps."""


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
    album = Album(data, device)
    free = torch.ones(count, dtype=torch.bool, device=device)
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
        one = torch.randint(len(album.pictures), (count,), generator=random, device=device)
        made = album.between(one, free, random)
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
            torch._foreach_lerp_(list(mean.parameters()), list(tower.parameters()), 1 / min(MEAN_STEPS, clock.step + 1))
        if clock.tell:
            agreed = (told.argmax(1) == wanted.argmax(1)).float().mean()
            clock.say({"divergence": loss - least, "agreed": agreed})
    tower.load_state_dict(mean.state_dict())
    thinker.requires_grad_(True)
    clock.done()
