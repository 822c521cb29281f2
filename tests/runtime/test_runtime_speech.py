"""A packed omni model hears and speaks, and says what the unpacked one says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runtime_artifacts import wide_model

OMNI = "Qwen3OmniMoeForConditionalGeneration"


@pytest.fixture(scope="module")
def heard(transformers: Any, tiny_omni: Path) -> dict[str, Any]:
    """A prompt with half a second of audio, put together without the processor, which needs torchvision."""
    import torch

    config = transformers.AutoConfig.from_pretrained(tiny_omni).thinker_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_omni)
    frames = 100
    text = (
        "<|im_start|>user\n<|audio_start|>"
        + tokenizer.decode([config.audio_token_id]) * 13
        + "<|audio_end|>What do you hear?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert (ids == config.audio_token_id).sum() == 13
    features = torch.randn(1, config.audio_config.num_mel_bins, frames, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": features,
        "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),
    }


def spoken(model: Any, heard: dict[str, Any]) -> tuple[Any, Any]:
    import torch

    torch.manual_seed(0)
    sequences, waveform = model.generate(
        **heard,
        return_audio=True,
        speaker="Ethan",
        thinker_max_new_tokens=6,
        thinker_do_sample=False,
        talker_max_new_tokens=6,
        talker_do_sample=False,
    )
    return sequences, waveform


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-thinker-talker"])
def test_it_hears_and_speaks(
    transformers: Any, artifact: Callable[..., Path], heard: dict[str, Any], recipe: str
) -> None:
    import torch

    folder = artifact(recipe=recipe)
    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder)
    sequences, waveform = spoken(model, heard)
    assert waveform.shape[-1] > 4 * 1920 - 2 * 1920
    assert waveform.isfinite().all()
    assert waveform.std() > 0.01
    expected_sequences, expected_waveform = spoken(wide_model(transformers, folder, OMNI), heard)
    assert torch.equal(sequences, expected_sequences)
    assert torch.equal(waveform, expected_waveform)
