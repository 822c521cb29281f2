"""Pictures of digits, drawn on the device in batches with all kinds of variation, as the image processor would give them."""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 16
PLAIN = 0.3
"""Share of varied pictures that are a file of 8 x 8 pixels scaled up, without any other variation."""
SIDE = 8
"""Most patches on a side: pictures up to 128 pixels, the processor's limit for this model."""


def draw(
    digits: Tensor,
    rows: Tensor,
    columns: Tensor,
    vary: bool,
    random: torch.Generator | None,
    side: int = SIDE * PATCH,
) -> Tensor:
    """Draws 8 x 8 digits on canvases.

    Args:
        digits: ``(n, 8, 8)`` in [0, 1], ink is 1.
        rows: patches of each canvas from top to bottom, ``(n,)``, even.
        columns: from left to right.
        vary: size, place, slant, stroke, contrast, polarity, colour, noise, of most; a share of `PLAIN` fills the canvas as
            a scaled-up file does, blocky or smooth, some of them inverted. Otherwise all fill it, white on black, blocky.
        random: of the variation, on the digits' device.
        side: pixels of the result's sides, at least the largest canvas'.

    Returns:
        ``(n, 3, side, side)`` in [0, 1]; what lies outside a canvas is not looked at.
    """
    count, device = len(digits), digits.device
    height, width = rows.float() * PATCH, columns.float() * PATCH
    place = torch.arange(side, device=device) + 0.5
    y, x = torch.meshgrid(place, place, indexing="ij")
    centre_y, centre_x = height / 2, width / 2
    scale_y, scale_x = height / 8, width / 8

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=random, device=device) * (high - low) + low

    turn = torch.zeros(count, device=device)
    slant = turn
    if vary:
        plain = uniform(0, 1) < 0.3
        size = torch.where(plain, 1.0, uniform(0.5, 1.15))
        pixel = torch.minimum(height, width) / 8 * size
        scale_y, scale_x = pixel * uniform(0.88, 1.12), pixel * uniform(0.82, 1.15)
        free = torch.where(plain, 0.02, 0.45)
        centre_y = centre_y + free * uniform(-1, 1) * (height - 8 * scale_y).clamp(min=2)
        centre_x = centre_x + free * uniform(-1, 1) * (width - 8 * scale_x).clamp(min=2)
        turn, slant = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    down = y[None] - centre_y[:, None, None]
    right = x[None] - centre_x[:, None, None]
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    v = (cos * down - sin * right) / scale_y[:, None, None]
    u = (sin * down + cos * right) / scale_x[:, None, None] + slant[:, None, None] * v
    if vary:
        # Strokes bend a little, as from hand to hand.
        bend = torch.nn.functional.interpolate(
            uniform(-1, 1, 2, 4, 4), size=(side, side), mode="bicubic", align_corners=True
        ) * torch.where(uniform(0, 1, 1, 1, 1) < 0.4, 0.0, uniform(0, 0.6, 1, 1, 1))
        u, v = u + bend[:, 0], v + bend[:, 1]
    grid = torch.stack([u, v], dim=-1) / 4
    source = digits[:, None]
    blocky = torch.nn.functional.grid_sample(source, grid, mode="nearest", align_corners=False)
    if not vary:
        return blocky.expand(-1, 3, -1, -1)
    smooth = torch.nn.functional.grid_sample(source, grid, mode="bilinear", align_corners=False)
    sharp = torch.sigmoid((smooth - uniform(0.25, 0.5, 1, 1, 1)) * uniform(6, 40, 1, 1, 1))
    kind = uniform(0, 1, 1, 1, 1)
    ink = torch.where(kind < 0.3, blocky, torch.where(kind < 0.55, smooth, sharp))
    ink = ink ** torch.where(uniform(0, 1, 1, 1, 1) < 0.5, 1.0, uniform(0.6, 1.6, 1, 1, 1))
    contrast = uniform(0.35, 1.0, 1, 1, 1)
    base = (1 - contrast) * uniform(0, 1, 1, 1, 1)
    grey = base + contrast * ink
    grey = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, grey, 1 - grey)
    tint = torch.where(uniform(0, 1, 1, 1, 1) < 0.25, uniform(0.5, 1.0, 3, 1, 1), 1.0)
    picture = grey * tint
    noise = torch.randn(picture.shape, generator=random, device=device)
    loud = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, 0.0, uniform(0, 0.08, 1, 1, 1))
    varied = (picture + noise * loud).clamp(0, 1)
    filling = torch.stack([x[None] / width[:, None, None], y[None] / height[:, None, None]], dim=-1) * 2 - 1
    kind = uniform(0, 1, 1, 1, 1)
    file = torch.where(
        kind < 0.5,
        torch.nn.functional.grid_sample(source, filling, mode="nearest", align_corners=False),
        torch.nn.functional.grid_sample(source, filling, "bicubic", padding_mode="border", align_corners=False),
    ).clamp(0, 1)
    file = torch.where(uniform(0, 1, 1, 1, 1) < 0.3, 1 - file, file)
    return torch.where(uniform(0, 1, 1, 1, 1) < PLAIN, file, varied)


def patches(pictures: Tensor) -> Tensor:
    """``(n, 3, 128, 128)`` in [0, 1] to the image processor's patches, ``(n, 64, 1536)``, in blocks of two by two.

    Pictures of other sides, multiples of 32 pixels, give ``(side / 16) ** 2`` patches.
    """
    count, most = len(pictures), (pictures.shape[-1] // PATCH) ** 2
    values = (pictures * 255).round() / 127.5 - 1
    half = pictures.shape[-1] // PATCH // 2
    # Channel, block row, row in block, pixel row, block column, column in block, pixel column.
    values = values.view(count, 3, half, 2, PATCH, half, 2, PATCH)
    values = values.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(count, most, 3, 1, PATCH * PATCH)
    return values.expand(-1, -1, -1, 2, -1).reshape(count, most, 3 * 2 * PATCH * PATCH)


def patch_places(side: int = SIDE) -> Tensor:
    """Row and column of each of the `side` by `side` patches in that order, ``(side ** 2, 2)``."""
    half = torch.arange(side // 2)
    pair = torch.arange(2)
    row = (half[:, None, None, None] * 2 + pair[None, None, :, None]).expand(side // 2, side // 2, 2, 2)
    column = (half[None, :, None, None] * 2 + pair[None, None, None, :]).expand(side // 2, side // 2, 2, 2)
    return torch.stack([row.reshape(-1), column.reshape(-1)], dim=-1)


def inside(places: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Which of the patches at `places` lie on each canvas, ``(n, 64)``."""
    return (places[None, :, 0] < rows[:, None]) & (places[None, :, 1] < columns[:, None])
