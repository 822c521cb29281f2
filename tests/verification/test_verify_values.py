"""Against the source: every damage to a value is found, and the usual causes are named."""

from __future__ import annotations

import numpy as np
import pytest
from verify_artifacts import COMPRESSED, MODELOPT, Artifact, assert_fails, check_of, load_folder, quantize

from omnifp4.errors import CheckpointError
from omnifp4.tiny import write_random_checkpoint

EXPERTS = "thinker.model.layers.1.mlp.experts"
DOWN = f"{EXPERTS}.3.down_proj"
OUT = "thinker.model.layers.0.self_attn.o_proj"


def packed_name(artifact: Artifact, module: str) -> str:
    name = f"{module}.weight_packed"
    return name if name in artifact.tensors else f"{module}.weight"


@pytest.fixture(params=["modelopt", "compressed"])
def artifact(request: pytest.FixtureRequest) -> Artifact:
    found: Artifact = request.getfixturevalue(request.param)
    return found


def test_swapped_nibbles(artifact, judge, source_folder):
    name = packed_name(artifact, DOWN)
    codes = artifact.bits(name)
    artifact.put(name, (codes >> 4) | (codes << 4))
    receipt = judge(artifact, source_folder)
    assert_fails(receipt, {"values.error"}, f"{DOWN}.weight", "the two codes of every byte are swapped")
    assert receipt.worst_tensors[0].name == f"{DOWN}.weight"


def test_zeroed_codes(artifact, judge, source_folder):
    name = packed_name(artifact, DOWN)
    artifact.put(name, np.zeros_like(artifact.bits(name)))
    assert_fails(judge(artifact, source_folder), {"values.error"}, f"{DOWN}.weight", "is zero")


def test_wrong_tensor_scale(artifact, judge, source_folder):
    name = next(n for n in (f"{DOWN}.weight_scale_2", f"{DOWN}.weight_global_scale") if n in artifact.tensors)
    factor = 2.0 if name.endswith("_2") else 0.5
    artifact.put_scalar(name, artifact.scalar(name) * factor)
    receipt = judge(artifact, source_folder)
    assert_fails(receipt, {"values.error"}, f"{DOWN}.weight", "tensor scale is 2", "times what it should be")


def test_exchanged_experts(artifact, judge, source_folder):
    one, two = (packed_name(artifact, f"{EXPERTS}.{n}.down_proj") for n in (3, 5))
    suffixes = ("", "_scale", "_scale_2") if one.endswith("weight") else ("",)
    for suffix in suffixes:
        artifact.tensors[one + suffix], artifact.tensors[two + suffix] = (
            artifact.tensors[two + suffix],
            artifact.tensors[one + suffix],
        )
    if len(suffixes) == 1:
        for suffix in ("weight_scale", "weight_global_scale"):
            first, second = (f"{EXPERTS}.{n}.down_proj.{suffix}" for n in (3, 5))
            artifact.tensors[first], artifact.tensors[second] = artifact.tensors[second], artifact.tensors[first]
    assert_fails(
        judge(artifact, source_folder),
        {"values.error"},
        f"{EXPERTS}.3.down_proj.weight",
        f"these are the values of {EXPERTS}.5.down_proj",
        f"these are the values of {EXPERTS}.3.down_proj",
    )


def test_exchanged_gate_and_up(modelopt, judge, source_folder):
    for suffix in ("weight", "weight_scale"):
        gate, up = (f"{EXPERTS}.0.{part}_proj.{suffix}" for part in ("gate", "up"))
        modelopt.tensors[gate], modelopt.tensors[up] = modelopt.tensors[up], modelopt.tensors[gate]
    receipt = judge(modelopt, source_folder)
    assert_fails(receipt, {"values.error"}, f"these are the values of {EXPERTS}.0.up_proj")


def test_nan_values_are_found_against_the_source(modelopt, judge, source_folder):
    name = f"{DOWN}.weight_scale"
    scales = modelopt.bits(name)
    scales[0, 0] = 0x7F
    modelopt.put(name, scales)
    assert_fails(judge(modelopt, source_folder), {"scales.finite", "values.error"}, f"{DOWN}.weight: 16 values are NaN")


def test_garbage_codes(modelopt, judge, source_folder):
    name = f"{DOWN}.weight"
    rng = np.random.default_rng(0)
    modelopt.put(name, rng.integers(0, 256, modelopt.bits(name).shape, dtype=np.uint8))
    assert_fails(judge(modelopt, source_folder), {"values.error"}, name, "max scaling gives")


def test_larger_error_of_calibrated_methods_is_noted_not_failed(modelopt, judge, source_folder):
    """A method that trades weight error for output error moves some codes by one step."""
    name = f"{DOWN}.weight"
    codes = modelopt.bits(name)
    rng = np.random.default_rng(0)
    moved = (rng.random(codes.shape) < 0.5) & ((codes & 7) > 0) & ((codes & 7) < 5)
    codes[moved] += 1
    modelopt.put(name, codes)
    receipt = judge(modelopt, source_folder)
    assert_fails(receipt, set())
    assert "1 err more than 1.5 times" in check_of(receipt, "values.error").summary


def test_a_large_error_that_gptq_made_and_states(modelopt, judge, source_folder):
    """Weakly damped, columns make up for each other: what the receipt states is no damage, whatever else is."""
    name = f"{DOWN}.weight"
    codes = modelopt.bits(name)
    moved = (codes & 7) < 4
    codes[moved] += 2
    modelopt.put(name, codes)
    found = judge(modelopt, source_folder)
    assert_fails(found, {"values.error"}, name, "max scaling gives")
    error = next(one.relative_squared_error for one in found.worst_tensors if one.name == name)
    assert 0.036 < error < 0.25

    def told(method: str, stated: float, damping: float = 0.001) -> bytes:
        made = {"method": {"name": method, "damping": damping}}
        return modelopt.receipt(calibration=made, decisions={name: stated})

    modelopt.side["omnifp4.json"] = told("gptq", error)
    passed = judge(modelopt, source_folder)
    assert_fails(passed, set())
    assert "1 err more than 1.5 times" in check_of(passed, "values.error").summary
    for method, stated in (("gptq", 2 * error), ("gptq", 0.0), ("awq-lite", error), ("nearest", error)):
        modelopt.side["omnifp4.json"] = told(method, stated)
        assert_fails(judge(modelopt, source_folder), {"values.error"}, name)
    modelopt.side["omnifp4.json"] = told("gptq", error, 0.03)
    assert_fails(judge(modelopt, source_folder), {"values.error"}, name)


def test_error_that_the_receipt_does_not_state(modelopt, judge, source_folder):
    modelopt.side["omnifp4.json"] = modelopt.receipt(decisions={f"{DOWN}.weight": 0.005})
    assert_fails(judge(modelopt, source_folder), {"values.error"}, f"{DOWN}.weight", "omnifp4.json says 0.005")


@pytest.mark.parametrize("name", ["thinker.model.norm.weight", "talker.codec_head.weight", "thinker.lm_head.weight"])
def test_flipped_bit_in_an_untouched_tensor(artifact, judge, source_folder, name):
    data = artifact.bits(name)
    data[-1] ^= 1
    artifact.put(name, data)
    assert_fails(judge(artifact, source_folder), {"values.untouched"}, name, f"byte {data.size - 1:,}")


def test_untouched_tensor_of_another_type(modelopt, judge, source_folder):
    name = "thinker.model.norm.weight"
    _, shape, data = modelopt.tensors[name]
    modelopt.tensors[name] = ("F16", shape, data)
    assert_fails(judge(modelopt, source_folder), {"values.untouched"}, name, "F16, in the source BF16")


def test_quantized_source_is_refused(modelopt, judge, tmp_path):
    other = modelopt.copy().write(tmp_path / "other")
    with pytest.raises(CheckpointError, match="already quantized"):
        judge(modelopt, other)


@pytest.mark.parametrize("dialect", [MODELOPT, COMPRESSED])
@pytest.mark.parametrize("transposed", [False, True])
def test_source_with_fused_experts(tmp_path, judge, dialect, transposed):
    """3-D experts on disk, as some checkpoints have them; the artifact has one tensor for each projection."""
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "tie_word_embeddings": False,
    }
    if transposed:
        config = vl_config(config)
    apart = load_folder(write_random_checkpoint(config, tmp_path / "apart"))
    stem = next(n.split(".experts.")[0] + ".experts" for n in apart.tensors if ".experts." in n)
    fused = apart.copy()
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        experts = []
        for expert in range(4):
            pieces = []
            for part in parts:
                _, shape, data = fused.tensors.pop(f"{stem}.{expert}.{part}.weight")
                pieces.append(np.frombuffer(data, "<u2").reshape(shape))
            matrix = np.concatenate(pieces)
            experts.append(matrix.T if transposed else matrix)
        stack = np.stack(experts)
        fused.tensors[f"{stem}.{name}"] = ("BF16", stack.shape, np.ascontiguousarray(stack).tobytes())
    ignore = ["lm_head", "*.mlp.gate", "model.visual*"]
    if dialect == COMPRESSED:
        ignore = ["lm_head", r"re:.*\.mlp\.gate$", r"re:.*visual\..*"]
    receipt = judge(quantize(apart, dialect, ignore=ignore), fused.write(tmp_path / "fused"))
    assert_fails(receipt, set())
    assert receipt.fp4_linears == 4 + 4 * 3


def vl_config(text: dict[str, object]) -> dict[str, object]:
    return {
        "model_type": "qwen3_vl_moe",
        "tie_word_embeddings": False,
        "text_config": {**text, "model_type": "qwen3_vl_moe_text"},
        "vision_config": {
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    }
