"""Packed models answer as the same models do with weights unpacked by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runtime_artifacts import as_other_tool, changed, wide_model

OMNI = "Qwen3OmniMoeForConditionalGeneration"


def logits(model: Any, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        return (model.thinker if hasattr(model, "thinker") else model)(input_ids=tokens).logits


def packed_modules(model: Any) -> list[str]:
    from omnifp4.runtime.packed import PackedModule

    return [name for name, module in model.named_modules() if isinstance(module, PackedModule)]


@pytest.mark.parametrize("rule", ["sweep", "max"])
@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_thinker_logits_are_equal(
    transformers: Any, artifact: Callable[..., Path], tokens: Any, format: str, rule: str
) -> None:
    import torch

    folder = artifact(format, rule=rule)
    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    # Four layers: q, k, v, o and one set of experts each.
    assert len(packed_modules(model)) == 20
    expected = logits(wide_model(transformers, folder, OMNI), tokens)
    assert expected.std() > 1
    assert torch.equal(logits(model, tokens), expected)


def test_load_is_from_pretrained(transformers: Any, artifact: Callable[..., Path], tokens: Any) -> None:
    import torch

    from omnifp4.runtime import load

    folder = artifact()
    model = load(folder, progress=False)
    assert model.generation_config.max_length == 20 or model.generation_config.to_diff_dict()
    assert not model.training
    plain = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder)
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert torch.equal(logits(model, tokens), logits(plain, tokens))


@pytest.mark.parametrize(
    ("name", "class_name"),
    [("qwen3_moe", "Qwen3MoeForCausalLM"), ("qwen3", "Qwen3ForCausalLM"), ("llama", "LlamaForCausalLM")],
)
def test_siblings(transformers: Any, sibling: Callable[[str], Path], tokens: Any, name: str, class_name: str) -> None:
    import torch

    folder = sibling(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == class_name
    assert packed_modules(model)
    expected = logits(wide_model(transformers, folder, class_name), tokens)
    assert torch.equal(logits(model, tokens), expected)


def test_vision_language_sibling(transformers: Any, sibling: Callable[[str], Path], tokens: Any) -> None:
    """Transformers has no converter from its experts' names on disk; a wide reference is put together by hand."""
    import torch

    folder = sibling("qwen3_vl_moe")
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(folder)
    expected = wide_model(transformers, folder, "Qwen3VLMoeForConditionalGeneration")
    for layer, packed in zip(expected.model.language_model.layers, model.model.language_model.layers, strict=True):
        experts, source = layer.mlp.experts, packed.mlp.experts
        for number in range(source.num_experts):
            experts.gate_up_proj.data[number] = source.backend.dequantize(source.gate_up(number), torch.bfloat16)
            experts.down_proj.data[number] = source.backend.dequantize(source.down(number), torch.bfloat16)
    assert torch.equal(logits(model, tokens), logits(expected, tokens))


def test_a_part_loads_from_the_whole(transformers: Any, artifact: Callable[..., Path], tokens: Any) -> None:
    import torch

    folder = artifact()
    thinker = transformers.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder)
    assert len(packed_modules(thinker)) == 20
    whole = transformers.AutoModelForTextToWaveform.from_pretrained(folder)
    assert torch.equal(logits(thinker, tokens), logits(whole, tokens))


def test_w4a4_runs_as_w4a16_and_says_so_once(
    transformers: Any, artifact: Callable[..., Path], tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from omnifp4.runtime import quantizer

    def announce(config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] = {**group["weights"], "dynamic": "local"}

    wide_inputs = artifact("compressed-tensors")
    folder = changed(wide_inputs, tmp_path / "w4a4", as_other_tool, announce)
    quantizer._told.clear()
    models = [transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder) for _ in range(2)]
    assert [record.message for record in caplog.records].count(
        "this checkpoint is W4A4; it runs as W4A16 here: weights in FP4, activations in BF16"
    ) == 1
    expected = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(wide_inputs)
    assert torch.equal(logits(models[0], tokens), logits(expected, tokens))


def test_auto_round_dialect(transformers: Any, sibling: Callable[[str], Path], tokens: Any, tmp_path: Path) -> None:
    import torch

    def announce(config: dict[str, Any]) -> None:
        config["quantization_config"] = {
            "quant_method": "auto-round",
            "packing_format": "auto_round:llm_compressor",
            "data_type": "nv_fp",
            "bits": 4,
            "group_size": 16,
        }

    plain = sibling("qwen3_moe")
    folder = changed(plain, tmp_path / "auto-round", config=announce)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = transformers.AutoModelForCausalLM.from_pretrained(plain)
    assert packed_modules(model) == packed_modules(expected)
    assert torch.equal(logits(model, tokens), logits(expected, tokens))


def test_names_of_memory_on_disk(transformers: Any, artifact: Callable[..., Path], tokens: Any, tmp_path: Path) -> None:
    """ModelOpt writes the thinker alone under the names that Transformers 5.21 and later have in memory."""
    import torch

    source = artifact()

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensor = tensors.pop(name)
            inner = name.removeprefix("thinker.")
            if inner == name:
                continue
            for old, new in (
                ("model.", "model.language_model."),
                ("audio_tower.", "model.audio_tower."),
                ("visual.", "model.visual."),
            ):
                if inner.startswith(old):
                    inner = new + inner.removeprefix(old)
                    break
            tensors[inner] = tensor

    def thinker_alone(config: dict[str, Any]) -> None:
        inner = config["thinker_config"] | {"quantization_config": config["quantization_config"]}
        inner |= {"architectures": ["Qwen3OmniMoeThinkerForConditionalGeneration"], "dtype": "bfloat16"}
        inner["model_type"] = "qwen3_omni_moe_thinker"
        config.clear()
        config.update(inner)

    folder = changed(source, tmp_path / "thinker", rename, thinker_alone)
    model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder)
    whole = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(source)
    assert torch.equal(logits(model, tokens), logits(whole, tokens))
    model.save_pretrained(tmp_path / "saved")
    from runtime_artifacts import differing

    assert not differing(folder, tmp_path / "saved")


def test_float32_on_request(transformers: Any, artifact: Callable[..., Path], tokens: Any) -> None:
    import torch

    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(artifact(), dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = wide_model(transformers, artifact(), OMNI).float()
    assert torch.equal(logits(model, tokens), logits(expected, tokens))
