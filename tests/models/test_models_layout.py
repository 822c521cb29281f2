"""What a layout says beyond names and shapes, on the released Qwen3-Omni config and on tiny ones."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from typing import Any

import pytest
import tiny_model_configs as tiny
from tiny_model_configs import change

from omnifp4.models import KNOWN_MODEL_TYPES, Kind, Layout, Part, layout_for
from omnifp4.tiny import released_config

RELEASED = released_config("qwen3-omni-30b-a3b")


@pytest.fixture(scope="module")
def released() -> Layout:
    return layout_for(RELEASED)


def millions(layout: Layout) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in layout.tensors:
        counts[tensor.component.name] += tensor.parameters
    return {name: round(count / 1e6) for name, count in counts.items()}


def test_the_released_checkpoint_has_28010_tensors_of_35_billion_parameters(released: Layout) -> None:
    assert len(released.tensors) == 28_010
    assert sum(tensor.parameters for tensor in released.tensors) == 35_259_818_545
    assert len(released.by_name) == len(released.tensors)
    assert not any(tensor.optional for tensor in released.tensors)
    assert released.routed_experts == 128


def test_parameters_of_each_component_of_the_released_checkpoint(released: Layout) -> None:
    assert millions(released) == {
        "audio_tower": 648,
        "vision_tower": 539,
        "thinker.embeddings": 311,
        "thinker.norms": 0,
        "thinker.attention": 906,
        "thinker.router": 13,
        "thinker.experts": 28_991,
        "thinker.head": 311,
        "talker.projections": 13,
        "talker.embeddings": 3,
        "talker.norms": 0,
        "talker.attention": 94,
        "talker.router": 3,
        "talker.experts": 3_020,
        "talker.shared_experts": 47,
        "talker.head": 3,
        "code_predictor": 142,
        "code2wav": 216,
    }


@pytest.mark.parametrize(
    ("name", "shape", "component"),
    [
        ("thinker.model.layers.47.mlp.experts.127.gate_proj.weight", (768, 2048), "thinker.experts"),
        ("thinker.model.layers.47.mlp.experts.127.down_proj.weight", (2048, 768), "thinker.experts"),
        ("thinker.model.layers.0.mlp.gate.weight", (128, 2048), "thinker.router"),
        ("thinker.model.layers.0.self_attn.q_norm.weight", (128,), "thinker.norms"),
        ("thinker.model.layers.0.self_attn.k_proj.weight", (512, 2048), "thinker.attention"),
        ("thinker.lm_head.weight", (152064, 2048), "thinker.head"),
        ("thinker.audio_tower.layers.31.self_attn.k_proj.bias", (1280,), "audio_tower"),
        ("thinker.visual.merger_list.2.ln_q.weight", (4608,), "vision_tower"),
        ("talker.model.layers.19.mlp.shared_expert.up_proj.weight", (768, 1024), "talker.shared_experts"),
        ("talker.model.layers.19.mlp.shared_expert_gate.weight", (1, 1024), "talker.router"),
        ("talker.hidden_projection.linear_fc1.bias", (2048,), "talker.projections"),
        ("talker.codec_head.weight", (3072, 1024), "talker.head"),
        ("talker.code_predictor.lm_head.14.weight", (2048, 1024), "code_predictor"),
        ("code2wav.decoder.4.block.1.conv.weight", (192, 96, 6), "code2wav"),
    ],
)
def test_tensors_of_the_released_checkpoint(
    released: Layout, name: str, shape: tuple[int, ...], component: str
) -> None:
    tensor = released.by_name[name]
    assert (tensor.shape, tensor.component.name) == (shape, component)


def test_the_released_layout_is_quick_and_needs_no_torch() -> None:
    code = "import sys, omnifp4.models; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    fastest = min(_seconds_to_build() for _ in range(3))
    assert fastest < 0.3


def _seconds_to_build() -> float:
    start = time.perf_counter()
    layout_for(RELEASED)
    return time.perf_counter() - start


@pytest.mark.parametrize("config", tiny.WHOLE_MODELS, ids=lambda config: config["model_type"])
def test_every_component_that_no_recipe_takes_unasked_says_why(config: dict[str, Any]) -> None:
    quantized = {Kind.ATTENTION, Kind.EXPERTS, Kind.SHARED_EXPERTS, Kind.MLP}
    for component in layout_for(config).components:
        unasked = component.part is Part.THINKER and component.kind in quantized
        assert bool(component.why_wide) is not unasked, component.name


@pytest.mark.parametrize("config", tiny.WHOLE_MODELS, ids=lambda config: config["model_type"])
def test_linears_are_matrices_with_a_place_for_a_bias(config: dict[str, Any]) -> None:
    layout = layout_for(config)
    for tensor in layout.tensors:
        if tensor.is_linear:
            assert len(tensor.shape) == 2 and tensor.name.endswith(".weight")
            last = tensor.module.rpartition(".")[2]
            assert last not in {"conv", "embed_tokens", "codec_embed", "codec_embedding", "pos_embed", "norm", "ln_q"}
        if tensor.name.endswith(".bias") and f"{tensor.module}.weight" in layout.by_name:
            assert tensor.component == layout.by_name[f"{tensor.module}.weight"].component
        if tensor.scale_group:
            assert tensor.is_linear


@pytest.mark.parametrize("config", tiny.WHOLE_MODELS, ids=lambda config: config["model_type"])
def test_scale_groups_hold_what_kernels_fuse(config: dict[str, Any]) -> None:
    fused = {
        "qkv": ({"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"q", "k", "v"}, {"to_q", "to_k", "to_v"}),
        "gate_up": ({"gate_proj", "up_proj"},),
    }
    layout = layout_for(config)
    assert layout.scale_groups
    for group, members in layout.scale_groups.items():
        prefix, _, kind = group.rpartition(".")
        assert {member.module.rpartition(".")[2] for member in members} in fused[kind]
        assert all(member.module.startswith(f"{prefix}.") for member in members)
        assert len({member.shape[1] for member in members}) == 1
    grouped = {tensor.name for members in layout.scale_groups.values() for tensor in members}
    ends = (".q_proj.weight", ".v_proj.weight", ".up_proj.weight", ".query.weight", ".to_k.weight", ".attn.q.weight")
    assert {t.name for t in layout.tensors if t.name.endswith(ends)} <= grouped


def test_keys_of_scale_groups() -> None:
    groups = layout_for(tiny.QWEN3_OMNI).scale_groups
    assert len(groups["thinker.model.layers.0.self_attn.qkv"]) == 3
    assert len(groups["thinker.model.layers.1.mlp.experts.3.gate_up"]) == 2
    assert len(groups["talker.model.layers.1.mlp.shared_expert.gate_up"]) == 2
    assert "encoder.layer.0.attention.self.qkv" in layout_for(tiny.BERT).scale_groups


@pytest.mark.parametrize(
    "config",
    [
        {key: value for key, value in tiny.QWEN3_OMNI.items() if key not in ("talker_config", "code2wav_config")},
        change(tiny.QWEN3_OMNI, talker_config=None),
        change(tiny.QWEN3_OMNI, enable_audio_output=False),
    ],
    ids=["absent", "null", "disabled"],
)
def test_thinking_and_captioner_have_no_speech(config: dict[str, Any]) -> None:
    layout = layout_for(config)
    assert all(tensor.name.startswith("thinker.") for tensor in layout.tensors)
    assert "no speech" in layout.notes[0]


def test_a_talker_on_disk_counts_more_than_the_flag() -> None:
    names = layout_for(tiny.QWEN3_OMNI).by_name
    layout = layout_for(change(tiny.QWEN3_OMNI, enable_audio_output=False), names)
    assert layout.missing(names) == layout.unknown(names) == []
    assert layout.by_name.keys() == names.keys()


def test_missing_and_unknown_names() -> None:
    layout = layout_for(tiny.QWEN3_OMNI)
    names = [name for name in layout.by_name if name != "talker.codec_head.weight"]
    assert layout.missing(names) == ["talker.codec_head.weight"]
    assert layout.unknown([*names, "thinker.model.layers.9.norm.weight"]) == ["thinker.model.layers.9.norm.weight"]


def test_buffers_that_exporters_write_are_tolerated() -> None:
    buffers = [
        "thinker.model.rotary_emb.inv_freq",
        "thinker.model.layers.0.self_attn.rotary_emb.inv_freq",
        "thinker.visual.rotary_pos_emb.inv_freq",
        "thinker.audio_tower.positional_embedding.positional_embedding",
        "code2wav.code_offset",
        "bert.embeddings.position_ids",
        "token2wav.code2wav_dit_model.rotary_embed.inv_freq",
    ]
    assert layout_for(tiny.QWEN3_OMNI).unknown(buffers) == []


def test_fused_experts_stand_for_the_single_ones() -> None:
    layout = layout_for(tiny.QWEN3_OMNI)
    names = [name for name in layout.by_name if ".layers.1.mlp.experts." not in name]
    fused = [name for name in layout.fused_names if ".layers.1." in name]
    assert fused == [
        "thinker.model.layers.1.mlp.experts.gate_up_proj",
        "thinker.model.layers.1.mlp.experts.down_proj",
        "talker.model.layers.1.mlp.experts.gate_up_proj",
        "talker.model.layers.1.mlp.experts.down_proj",
    ]
    assert layout.missing(names + fused) == layout.unknown(names + fused) == []
    assert len(layout.missing(names + fused[1:])) == 2 * 4

    form = layout.fused_form(fused[0], (4, 48, 32))
    assert form is not None and not form.transposed
    assert form.expert_tensor(3, form.parts[1]) == "thinker.model.layers.1.mlp.experts.3.up_proj.weight"
    assert layout.fused_form(fused[0], (4, 32, 48)) is None
    assert layout.fused_shapes(fused[0]) == ((4, 48, 32),)


def test_vl_experts_come_in_two_orientations() -> None:
    layout = layout_for(tiny.QWEN3_VL_MOE)
    up, down = (f"model.language_model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    assert layout.fused_shapes(up) == ((4, 32, 48), (4, 48, 32))
    assert layout.fused_shapes(down) == ((4, 24, 32), (4, 32, 24))
    for name, shape, transposed in ((up, (4, 32, 48), True), (up, (4, 48, 32), False), (down, (4, 24, 32), True)):
        form = layout.fused_form(name, shape)
        assert form is not None and form.transposed is transposed
    assert layout.fused_by_name[up].transposed
    assert layout.fused_form(up, (4, 48, 48)) is None
    assert layout.fused_form("elsewhere", (4, 48, 48)) is None


@pytest.mark.parametrize(("down_shape", "transposed"), [((4, 16, 32), True), ((4, 32, 16), False)])
def test_square_experts_follow_their_sibling(down_shape: tuple[int, ...], transposed: bool) -> None:
    layout = layout_for(change(tiny.QWEN3_VL_MOE, text_config__moe_intermediate_size=16))
    up, down = (f"model.language_model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    form = layout.fused_form(up, (4, 32, 32), {down: down_shape})
    assert form is not None and form.transposed is transposed


def test_a_tied_head_may_be_stored_or_not() -> None:
    config = tiny.QWEN3 | {"tie_word_embeddings": True}
    unsettled = layout_for(config)
    assert unsettled.by_name["lm_head.weight"].optional
    assert "lm_head.weight" in layout_for(config, unsettled.by_name).by_name
    stored = [name for name in unsettled.by_name if name != "lm_head.weight"]
    assert "lm_head.weight" not in layout_for(config, stored).by_name
    assert unsettled.missing(stored) == []
    assert layout_for(tiny.QWEN3, stored).missing(stored) == ["lm_head.weight"]


def test_bert_names_of_tensorflow_days() -> None:
    modern = layout_for(tiny.BERT | {"architectures": ["BertForMaskedLM"]})
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for name in modern.by_name
    }
    layout = layout_for(tiny.BERT, old)
    assert layout.by_name.keys() == old
    assert "bert.embeddings.LayerNorm.gamma" in old


def test_known_model_types() -> None:
    assert KNOWN_MODEL_TYPES == (
        "qwen3_omni_moe",
        "qwen3_omni_moe_thinker",
        "qwen2_5_omni",
        "qwen3_vl_moe",
        "qwen3_moe",
        "qwen3",
        "llama",
        "bert",
    )
