"""Rotary positions of a prompt with media, as the thinker of an omni model counts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def rotary_positions(thinker: Any, tensors: Mapping[str, Any], *, sound_in_video: bool) -> tuple[Tensor, Any]:
    """Asks the stock model.

    Args:
        thinker: with ``get_rope_index``.
        tensors: its keyword arguments, from the processor; ``input_ids`` is ``[1, tokens]``.
        sound_in_video: the audio features belong in part to videos.

    Returns:
        Positions ``[3, 1, tokens]``, wherever Transformers leaves them, and how far they are ahead of the tokens.
    """
    audio_mask = tensors.get("feature_attention_mask")
    positions, shift = thinker.get_rope_index(
        tensors["input_ids"],
        image_grid_thw=tensors.get("image_grid_thw"),
        video_grid_thw=tensors.get("video_grid_thw"),
        attention_mask=tensors["attention_mask"],
        use_audio_in_video=sound_in_video,
        audio_seqlens=None if audio_mask is None else audio_mask.sum(-1),
        second_per_grids=tensors.get("video_second_per_grid"),
    )
    return positions, shift
