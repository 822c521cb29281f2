"""Saving gives back the checkpoint that was loaded; leaving the talker out is told in the config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_artifacts import as_other_tool, changed, differing

from omnifp4.errors import OmniFP4Error
from small_checkpoints import Tensor, read_header, read_tensors


def told(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-thinker-talker"])
@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_same_tensors_and_claim(
    transformers: Any, artifact: Callable[..., Path], tmp_path: Path, format: str, recipe: str
) -> None:
    folder = artifact(format, recipe)
    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder)
    # Several shards, whose sizes are kept to although experts share memory.
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    assert not differing(folder, tmp_path / "saved")
    assert told(folder)["quantization_config"] == told(tmp_path / "saved")["quantization_config"]
    shards = [read_header(path)[0] for path in (tmp_path / "saved").glob("*.safetensors")]
    assert len(shards) > 10
    for entries in shards:
        assert len(entries) == 1 or max(entry["data_offsets"][1] for entry in entries.values()) <= 300_000


def test_scales_of_inputs_and_cache_are_kept(transformers: Any, sibling: Callable[[str], Path], tmp_path: Path) -> None:
    cache = {
        f"model.layers.{n}.self_attn.{p}_scale": Tensor("F32", np.array([0.5 + n], np.float32))
        for n in (0, 1)
        for p in "kv"
    }
    folder = changed(sibling("qwen3_moe"), tmp_path / "scales", lambda tensors: as_other_tool(tensors, **cache))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    assert not differing(folder, tmp_path / "saved")


def test_without_speech(transformers: Any, artifact: Callable[..., Path], tokens: Any, tmp_path: Path) -> None:
    import torch

    from omnifp4.runtime import load

    folder = artifact("compressed-tensors", "nvfp4-thinker-talker")
    model = load(folder, speech=False, progress=False)
    assert not model.has_talker
    assert not hasattr(model, "talker")
    assert model.config.enable_audio_output is False
    model.save_pretrained(tmp_path / "mute")
    assert told(tmp_path / "mute")["enable_audio_output"] is False
    kept = read_tensors(tmp_path / "mute")
    assert kept.keys() == {name for name in read_tensors(folder) if name.startswith("thinker.")}
    again = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path / "mute")
    assert not again.has_talker
    with torch.no_grad():
        expected = load(folder, progress=False).thinker(input_ids=tokens).logits
        assert torch.equal(again.thinker(input_ids=tokens).logits, expected)


def test_a_part_that_was_loaded_alone(
    transformers: Any, artifact: Callable[..., Path], tokens: Any, tmp_path: Path
) -> None:
    import torch

    part = transformers.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(artifact())
    part.save_pretrained(tmp_path / "thinker")
    whole, saved = read_tensors(artifact()), read_tensors(tmp_path / "thinker")
    assert saved.keys() == {name for name in whole if name.startswith("thinker.")}
    assert all(saved[name].same_as(whole[name]) for name in saved)
    again = transformers.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(tmp_path / "thinker")
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, part(input_ids=tokens).logits)


def test_speech_cannot_be_left_out_of_a_text_model(transformers: Any, sibling: Callable[[str], Path]) -> None:
    from omnifp4.runtime import load

    with pytest.raises(OmniFP4Error, match="qwen3 has no speech to leave out"):
        load(sibling("qwen3"), speech=False)


def test_a_part_cannot_be_saved_alone(transformers: Any, artifact: Callable[..., Path], tmp_path: Path) -> None:
    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(artifact())
    with pytest.raises(OmniFP4Error, match="save the whole model"):
        model.thinker.save_pretrained(tmp_path / "part")
    assert not list(tmp_path.glob("part/*.safetensors"))
    # A part without packed weights can.
    model.code2wav.save_pretrained(tmp_path / "code2wav")


def test_state_dict_holds_packed_weights(transformers: Any, artifact: Callable[..., Path], tokens: Any) -> None:
    import torch

    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(artifact())
    state = model.state_dict()
    held = sum(value.numel() for name, value in state.items() if value.dtype == torch.uint8)
    expected = sum(t.bits.size for t in read_tensors(artifact()).values() if t.dtype in ("U8", "F8_E4M3"))
    assert held == expected


def test_casting_moves_scales_and_does_not_round_them(transformers: Any, artifact: Callable[..., Path]) -> None:
    import torch

    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(artifact(rule="max"))
    before = {name: value.clone() for name, value in model.named_buffers() if "tensor_scale" in name}
    model.to(torch.bfloat16)
    for name, value in model.named_buffers():
        if name in before:
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name]), name
