"""Prompts of random tokens: different for each sequence, so that each is routed its own way, and the same in each run."""

from __future__ import annotations

from typing import Any

import torch

from omnifp4.chat.inputs import ModelInputs


def plain_vocabulary(config: Any) -> int:
    """Tokens below all markers of an omni model: none of them stands for media or roles."""
    thinker = config.thinker_config
    markers = (
        getattr(section, name, None)
        for section in (config, thinker)
        for name in dir(section)
        if name.endswith("_token_id") and not name.startswith(("user", "assistant", "system", "pad"))
    )
    found = [marker for marker in markers if isinstance(marker, int) and marker > 0]
    return min([int(thinker.text_config.vocab_size), *found])


def make_prompt(config: Any, tokens: int, *, seed: int, device: torch.device) -> ModelInputs:
    """A prompt of `tokens` random tokens."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, plain_vocabulary(config), (1, tokens), generator=random).to(device)
    return inputs_of(ids)


def inputs_of(ids: torch.Tensor) -> ModelInputs:
    """Ids, int64 ``[1, tokens]``, as an engine takes them."""
    return ModelInputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, sound_in_video=False, text="")
