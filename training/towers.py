"""The stock audio and vision towers on padded batches: the same modules and results, without a loop over examples.

Outside flash attention, the stock towers attend example by example in Python, which is most of a small model's time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.pictures import SIDE, inside, patch_places

CHUNK = 100
"""Mel frames that the audio tower's convolutions see at once."""
CHUNK_TOKENS = 13


def halved(lengths: Tensor) -> Tensor:
    return (lengths + 1) // 2


def hear(tower: Any, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The audio tower.

    Args:
        tower: ``Qwen3OmniMoeAudioEncoder``.
        mel: ``(n, 128, frames)``, frames a multiple of 100.
        frames: valid ones, ``(n,)``.

    Returns:
        Features ``(n, tokens, width)`` and which are valid, ``(n, tokens)``.
    """
    count, bands, longest = mel.shape
    chunks = longest // CHUNK
    states = mel.view(count, bands, chunks, CHUNK).permute(0, 2, 1, 3).reshape(count * chunks, 1, bands, CHUNK)
    first = torch.arange(chunks, device=mel.device)[None] * CHUNK
    lengths = (frames[:, None] - first).clamp(0, CHUNK).reshape(-1)
    for convolution in (tower.conv2d1, tower.conv2d2, tower.conv2d3):
        states = F.gelu(convolution(states))
        lengths = halved(lengths)
        # A chunk alone ends here and is padded with zeros; so it has to be in the batch.
        states = states * (torch.arange(states.shape[-1], device=mel.device) < lengths[:, None])[:, None, None]
    rows, channels, high, time = states.shape
    states = tower.conv_out(states.permute(0, 3, 1, 2).reshape(rows, time, channels * high))
    states = states + tower.positional_embedding.positional_embedding[:time].to(states.dtype)
    valid = (torch.arange(time, device=mel.device)[None] < lengths[:, None]).view(count, chunks * time)
    states = states.view(count, chunks * time, -1)
    # A row without any sound attends everywhere rather than nowhere; nothing reads it.
    mask = (valid | ~valid.any(1, keepdim=True))[:, None, None]
    for layer in tower.layers:
        attention = layer.self_attn
        normed = layer.self_attn_layer_norm(states)
        query, key, value = (
            projection(normed).view(count, chunks * time, attention.num_heads, -1).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states + attention.out_proj(mixed.transpose(1, 2).reshape(count, chunks * time, -1))
        states = states + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(states))))
    states = tower.proj2(tower.act(tower.proj1(tower.ln_post(states))))
    return states, valid


class Sight:
    """The vision tower on canvases of 8 x 8 patches, of which each picture fills a part.

    Args:
        tower: ``Qwen3OmniMoeVisionEncoder``.
        side: patches on each side of the canvas, even. Shapes below are those of 8.
    """

    def __init__(self, tower: Any, side: int = SIDE) -> None:
        self.tower, self.most = tower, side * side
        device = tower.pos_embed.weight.device
        places = patch_places(side).to(device)
        self.grid = tower.num_grid_per_side
        position = places.float()
        frequencies = tower.rotary_pos_emb.inv_freq.float().to(device)
        angles = torch.cat([position[:, :1] * frequencies, position[:, 1:] * frequencies], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.places = places

    def _positions(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The learned grid of positions, stretched to each picture; ``(n, 64, width)``."""
        weight = self.tower.pos_embed.weight
        step_y = (self.grid - 1) / (rows.float() - 1)
        step_x = (self.grid - 1) / (columns.float() - 1)
        y = (self.places[None, :, 0] * step_y[:, None]).clamp(max=self.grid - 1)
        x = (self.places[None, :, 1] * step_x[:, None]).clamp(max=self.grid - 1)
        top, left = y.floor().long(), x.floor().long()
        below, right = (top + 1).clamp(max=self.grid - 1), (left + 1).clamp(max=self.grid - 1)
        dy, dx = (y - top)[..., None], (x - left)[..., None]
        upper = weight[top * self.grid + left] * (1 - dx) + weight[top * self.grid + right] * dx
        lower = weight[below * self.grid + left] * (1 - dx) + weight[below * self.grid + right] * dx
        return upper * (1 - dy) + lower * dy

    def __call__(self, patches: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Sees.

        Args:
            patches: ``(n, 64, 1536)``.
            rows: patches on each canvas from top to bottom, ``(n,)``.
            columns: from left to right.

        Returns:
            Features ``(n, 16, width)``, those of the deepstack layers, and which are valid, ``(n, 16)``.
        """
        tower, count = self.tower, len(patches)
        valid = inside(self.places, rows, columns)
        # Kernel and stride of the convolution are the patch: a matrix product, without a convolution's set-up.
        filters = tower.patch_embed.proj
        states = F.linear(patches, filters.weight.flatten(1), filters.bias)
        states = states + self._positions(rows, columns).to(states.dtype)
        mask = valid[:, None, None]
        deep = []
        for number, block in enumerate(tower.blocks):
            attention = block.attn
            query, key, value = (
                attention.qkv(block.norm1(states))
                .view(count, self.most, 3, attention.num_heads, -1)
                .permute(2, 0, 3, 1, 4)
            )
            query, key = self._turned(query), self._turned(key)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            states = states + attention.proj(mixed.transpose(1, 2).reshape(count, self.most, -1))
            states = states + block.mlp(block.norm2(states))
            if number in tower.deepstack_visual_indexes:
                merger = tower.merger_list[tower.deepstack_visual_indexes.index(number)]
                deep.append(merger(states.reshape(count * self.most, -1)).view(count, self.most // 4, -1))
        merged = tower.merger(states.reshape(count * self.most, -1)).view(count, self.most // 4, -1)
        return merged, deep, valid.view(count, self.most // 4, 4)[..., 0]

    def _turned(self, states: Tensor) -> Tensor:
        half = states.shape[-1] // 2
        rotated = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
        return (states.float() * self.cos + rotated.float() * self.sin).to(states.dtype)


def tower_of(thinker: Any, name: str) -> Any:
    """``audio_tower`` or ``visual``, wherever this Transformers version keeps it."""
    owner = thinker if hasattr(thinker, name) else thinker.model
    return getattr(owner, name)
