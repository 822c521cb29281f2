"""What the config says: place, scheme, ignore, speech."""

from __future__ import annotations

import json

import pytest
from verify_artifacts import Artifact, assert_fails, check_of, failing

from omnifp4.receipt.base import Verdict

LAYER = "thinker.model.layers.0"


def test_nested_only(modelopt, judge):
    quantization = modelopt.config.pop("quantization_config")
    modelopt.config["thinker_config"]["quantization_config"] = quantization
    assert_fails(judge(modelopt), {"config.place"}, "thinker_config.quantization_config only")


def test_no_config_at_all(modelopt, judge):
    del modelopt.config["quantization_config"]
    assert_fails(judge(modelopt), {"config.place"}, "56 linears are FP4", "no quantization_config")


@pytest.mark.parametrize("value", ["nvfp4", [], 4, True])
def test_config_is_no_object(modelopt, judge, value):
    modelopt.config["quantization_config"] = value
    assert_fails(judge(modelopt), {"config.place"}, type(value).__name__)


def legacy(artifact: Artifact, **changes: object) -> bytes:
    quantization = artifact.config["quantization_config"]
    inner = {
        "quant_algo": quantization["quant_algo"],
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": quantization["ignore"],
    }
    return json.dumps({"producer": {"name": "modelopt"}, "quantization": inner | changes}).encode()


def test_legacy_file_beside_it(modelopt, judge):
    modelopt.side["hf_quant_config.json"] = legacy(modelopt)
    receipt = judge(modelopt)
    assert_fails(receipt, set())
    assert "stands beside it" in check_of(receipt, "config.place").summary


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_algo": "FP8"}, "quant_algo FP8"),
        ({"group_size": 32}, "group_size 32"),
        ({"exclude_modules": ["lm_head"]}, "exclude_modules"),
    ],
)
def test_legacy_file_contradicts(modelopt, judge, changes, words):
    modelopt.side["hf_quant_config.json"] = legacy(modelopt, **changes)
    assert_fails(judge(modelopt), {"config.place"}, words)


def test_legacy_file_alone(modelopt_w4a4, modelopt, judge):
    modelopt.side["hf_quant_config.json"] = legacy(modelopt)
    del modelopt.config["quantization_config"]
    assert_fails(judge(modelopt), {"config.place"}, "vLLM refuses quant_algo W4A16_NVFP4")
    modelopt_w4a4.side["hf_quant_config.json"] = legacy(modelopt_w4a4)
    del modelopt_w4a4.config["quantization_config"]
    receipt = judge(modelopt_w4a4)
    assert_fails(receipt, set())
    assert "vLLM reads it there, Transformers and others do not" in check_of(receipt, "config.place").summary


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "fp4"}, "quant_method 'fp4'"),
        ({"quant_algo": "FP8"}, "quant_algo FP8"),
        ({"quant_algo": None}, "quant_algo none"),
        ({"group_size": 32}, "group_size is 32"),
        ({"quant_algo": "MIXED_PRECISION"}, "names no layer"),
    ],
)
def test_modelopt_scheme(modelopt, judge, changes, words):
    modelopt.quantization.update(changes)
    receipt = judge(modelopt)
    assert "config.scheme" in failing(receipt)
    assert words in "\n".join(failing(receipt)["config.scheme"].findings)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        (None, {"format": "pack-quantized"}, "format 'pack-quantized'"),
        (None, {"config_groups": {}}, "config_groups is missing"),
        (None, {"quantization_status": "frozen"}, "frozen"),
        ("weights", {"num_bits": 8}, "8 bits"),
        ("weights", {"group_size": 32}, "group_size is 32"),
        ("weights", {"strategy": "channel"}, "strategy 'channel'"),
    ],
)
def test_compressed_tensors_scheme(compressed, judge, part, changes, words):
    target = compressed.quantization
    (target["config_groups"]["group_0"][part] if part else target).update(changes)
    receipt = judge(compressed)
    assert "config.scheme" in failing(receipt)
    assert words in "\n".join(failing(receipt)["config.scheme"].findings)


def test_config_of_the_other_dialect(modelopt, compressed, judge):
    modelopt.config["quantization_config"] = compressed.config["quantization_config"]
    assert_fails(judge(modelopt), {"config.scheme"}, "named as modelopt names them")


@pytest.mark.parametrize("dialect", ["modelopt", "compressed"])
@pytest.mark.parametrize(
    ("words", "entry"),
    [
        ("thinker.model.layers.0.mlp.gate", "gate"),
        ("thinker.lm_head", "lm_head"),
        ("thinker.visual", "visual"),
        ("thinker.audio_tower", "audio_tower"),
        ("talker.model.layers.0", "talker"),
        ("code2wav", "code2wav"),
    ],
)
def test_ignore_lacks_an_entry(request, judge, dialect, words, entry):
    artifact = request.getfixturevalue(dialect)
    artifact.quantization["ignore"] = [e for e in artifact.quantization["ignore"] if entry not in e]
    assert_fails(judge(artifact), {"ignore"}, words)


@pytest.mark.parametrize(
    ("dialect", "entry"), [("modelopt", "*.0.self_attn.o_proj"), ("compressed", "re:.*0.*o_proj$")]
)
def test_ignore_covers_an_fp4_linear(request, judge, dialect, entry):
    artifact = request.getfixturevalue(dialect)
    artifact.quantization["ignore"].append(entry)
    assert_fails(judge(artifact), {"ignore"}, f"{LAYER}.self_attn.o_proj: FP4")


def test_wildcards_mean_nothing_to_compressed_tensors(compressed, judge):
    compressed.quantization["ignore"] = [
        "lm_head",
        "re:.*gate$",
        "thinker.visual*",
        "re:.*(talker|code2wav|audio|head).*",
    ]
    assert_fails(judge(compressed), {"ignore"}, "thinker.visual", "matches nothing")


def test_expressions_mean_nothing_to_modelopt(modelopt, judge):
    modelopt.quantization["ignore"][0] = "re:.*lm_head"
    assert_fails(judge(modelopt), {"ignore"}, "thinker.lm_head", "no re: expressions")


def test_expression_that_fits_only_checkpoint_names(compressed, judge):
    """vLLM calls it visual, and renames nothing inside an expression."""
    entries = compressed.quantization["ignore"]
    compressed.quantization["ignore"] = [e.replace("re:.*visual", "re:thinker.visual") for e in entries]
    assert_fails(judge(compressed), {"ignore.engines"}, "thinker.visual.blocks.0", "vLLM knows it as visual.blocks.0")


def test_full_names_are_renamed_by_engines(compressed, judge, wide):
    """As llm-compressor writes them."""
    fp4 = {name.removesuffix(".weight_packed") for name in compressed.tensors if name.endswith("packed")}
    modules = [
        n.removesuffix(".weight") for n, (_, shape, _) in wide.tensors.items() if len(shape) == 2 and "bias" not in n
    ]
    compressed.quantization["ignore"] = [module for module in modules if module not in fp4]
    assert_fails(judge(compressed), set())


def test_part_of_a_fused_linear_stays_wide(modelopt, wide, judge):
    module = f"{LAYER}.self_attn.v_proj"
    del modelopt.tensors[f"{module}.weight_scale"], modelopt.tensors[f"{module}.weight_scale_2"]
    modelopt.tensors[f"{module}.weight"] = wide.tensors[f"{module}.weight"]
    modelopt.quantization["ignore"].append(module)
    assert_fails(judge(modelopt), {"ignore.engines"}, f"{module} is not", "builds", "qkv_proj as one")


def test_bad_expression(compressed, judge):
    compressed.quantization["ignore"].append("re:(")
    assert_fails(judge(compressed), {"ignore"}, "'re:(' is no regular expression")


@pytest.mark.parametrize("garbage", [None, "lm_head", {"a": 1}, [1, None, ["x"]], []])
def test_garbage_in_ignore_is_no_crash(modelopt, judge, garbage):
    modelopt.quantization["ignore"] = garbage
    assert "ignore" in failing(judge(modelopt))


@pytest.mark.parametrize(
    "garbage",
    [
        {"config_groups": []},
        {"config_groups": {"a": None, "b": 3}},
        {"config_groups": {"a": {"weights": [], "input_activations": 7, "targets": "Linear"}}},
        {"format": ["x"], "config_groups": {"a": {"format": None, "weights": {"num_bits": {}, "type": []}}}},
        {"quant_method": None},
        {"quant_method": {"x": 1}, "quant_algo": ["NVFP4"]},
        {"quantized_layers": {"x": 1, "y": {"quant_algo": None}}},
        {"quantization": {"quant_algo": 1, "exclude_modules": "x"}},
    ],
)
@pytest.mark.parametrize("dialect", ["modelopt", "compressed"])
def test_garbage_in_the_config_is_no_crash(request, judge, dialect, garbage):
    artifact = request.getfixturevalue(dialect)
    artifact.quantization.update(garbage)
    judge(artifact)


def test_speech_without_a_talker(modelopt, judge):
    modelopt.tensors = {n: s for n, s in modelopt.tensors.items() if not n.startswith(("talker.", "code2wav."))}
    receipt = judge(modelopt)
    assert_fails(receipt, {"config.speech"}, "enable_audio_output is true", "random talker")
    modelopt.config["enable_audio_output"] = False
    assert_fails(judge(modelopt), set())


def test_talker_without_speech(modelopt, judge):
    modelopt.config["enable_audio_output"] = False
    assert_fails(judge(modelopt), {"config.speech"}, "enable_audio_output is False")


def test_wide_checkpoint_is_not_an_artifact(wide, judge):
    receipt = judge(wide)
    assert_fails(receipt, {"fp4.present", "fp4.ratio"}, "1.00x", "nothing is quantized")
    assert check_of(receipt, "scales.finite").verdict is Verdict.NOT_CHECKED
    assert check_of(receipt, "ignore").verdict is Verdict.NOT_CHECKED
