"""What one sample is to the thinker: the processor's tensors, with positions made as when the model talks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from omnifp4.errors import OmniFP4Error
from omnifp4.runtime.positions import rotary_positions


class Inputs(Protocol):
    """One sample; `omnifp4.chat.inputs.ModelInputs` is one."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Keyword arguments of the thinker; ``input_ids`` and ``attention_mask`` of shape ``(1, tokens)``."""

    @property
    def sound_in_video(self) -> bool:
        """The audio features belong in part to videos."""


def thinker_arguments(thinker: Any, inputs: Inputs, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the thinker's forward, on `device`, with positions ``(4, 1, tokens)`` and without a cache.

    Args:
        thinker: for its rule of positions; its weights are not used. A model of text alone has no such rule, and takes
            positions ``(1, tokens)``.
        inputs: one sample.
        device: where the arguments go.

    Raises:
        OmniFP4Error: several sequences in one sample: padding would change their numbers.
    """
    tensors = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.tensors.items()
    }
    ids = tensors["input_ids"]
    if ids.shape[0] != 1:
        raise OmniFP4Error(f"a sample holds {ids.shape[0]} sequences", hint="give each sequence as a sample of its own")
    text_positions = torch.arange(ids.shape[1], device=device).view(1, -1)
    if not hasattr(thinker, "get_rope_index"):
        return {**tensors, "position_ids": text_positions, "use_cache": False}
    positions, _ = rotary_positions(thinker, tensors, sound_in_video=inputs.sound_in_video)
    return {
        **tensors,
        "position_ids": torch.cat([text_positions[None], positions.to(device)]),
        "use_audio_in_video": inputs.sound_in_video,
        "use_cache": False,
    }
