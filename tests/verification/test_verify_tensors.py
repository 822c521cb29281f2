"""What is stored: completeness, real FP4, shards, side files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from verify_artifacts import MODELOPT, Artifact, assert_fails, check_of, failing, narrow, quantize, widen

from omnifp4.errors import CheckpointError
from omnifp4.formats import reference
from omnifp4.receipt.base import Verdict
from omnifp4.verification import verify

EXPERT = "thinker.model.layers.1.mlp.experts.3"
DOWN = f"{EXPERT}.down_proj"
NORM = "thinker.model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("name", [NORM, f"{DOWN}.weight_scale", f"{DOWN}.weight_scale_2"])
def test_missing_tensor(modelopt, judge, name):
    del modelopt.tensors[name]
    receipt = judge(modelopt)
    assert "tensors.complete" in {check.name for check in receipt.checks if check.verdict is Verdict.FAIL}
    assert name.rpartition(".")[0] in check_of(receipt, "tensors.complete").findings[0]


def test_missing_codes(compressed, judge):
    del compressed.tensors[f"{DOWN}.weight_packed"]
    assert_fails(judge(compressed), {"tensors.complete"}, f"{DOWN}.weight: missing", f"{DOWN}.weight_scale")


def test_extra_tensor(modelopt, judge):
    modelopt.tensors["thinker.model.layers.9.extra.weight"] = ("BF16", (2,), bytes(4))
    assert_fails(judge(modelopt), {"tensors.complete"}, "thinker.model.layers.9.extra.weight")


def test_buffers_are_tolerated(modelopt, judge):
    modelopt.tensors["thinker.model.rotary_emb.inv_freq"] = ("F32", (4,), bytes(16))
    assert_fails(judge(modelopt), set())


@pytest.mark.parametrize("dtype", ["F32", "F8_E4M3"])
def test_wrong_dtype_of_a_scale(modelopt, judge, dtype):
    name = f"{DOWN}.weight_scale_2"
    modelopt.tensors[name] = (dtype, (2,), bytes(8 if dtype == "F32" else 2))
    assert_fails(judge(modelopt), {"tensors.complete"}, name, "where F32 [] or [1] is needed")


def test_block_scale_of_another_type(modelopt, judge):
    name = f"{DOWN}.weight_scale"
    _, shape, data = modelopt.tensors[name]
    modelopt.tensors[name] = ("BF16", shape, data * 2)
    assert_fails(judge(modelopt), {"tensors.complete"}, name, "where F8_E4M3")


def test_wide_tensor_of_another_type(modelopt, judge):
    _, shape, data = modelopt.tensors[NORM]
    modelopt.tensors[NORM] = ("I16", shape, data)
    assert_fails(judge(modelopt), {"tensors.complete"}, NORM, "I16")


def test_transposed_codes(modelopt, judge):
    # q_proj is [256, 128]: turned round it is [128, 256].
    name = "thinker.model.layers.0.self_attn.q_proj.weight"
    dtype, (rows, half), data = modelopt.tensors[name]
    modelopt.tensors[name] = (dtype, (half * 2, rows // 2), data)
    scale = name.replace("weight", "weight_scale")
    modelopt.tensors[scale] = ("F8_E4M3", (half * 2, rows // 16), modelopt.tensors[scale][2])
    assert_fails(judge(modelopt), {"tensors.complete"}, name, "transposed")


def test_bf16_left_where_fp4_is_claimed(modelopt, wide, judge):
    del modelopt.tensors[f"{DOWN}.weight_scale"], modelopt.tensors[f"{DOWN}.weight_scale_2"]
    modelopt.tensors[f"{DOWN}.weight"] = wide.tensors[f"{DOWN}.weight"]
    assert_fails(judge(modelopt), {"fp4.present"}, f"{DOWN}: the config says FP4, its weight is BF16")


def test_all_experts_left_wide(modelopt, wide, judge):
    for name in list(modelopt.tensors):
        if name.startswith("thinker.") and ".mlp.experts." in name:
            del modelopt.tensors[name]
            if name in wide.tensors:
                modelopt.tensors[name] = wide.tensors[name]
    assert_fails(judge(modelopt), {"fp4.present", "fp4.ratio"}, "48 linears", "would leave")


def test_experts_left_fused_and_wide(modelopt, wide, judge):
    """As tools do that know only nn.Linear: the 3-D tensors of Transformers 5 stay BF16."""
    for layer in range(2):
        stem = f"thinker.model.layers.{layer}.mlp.experts"
        experts = sorted({n.split(".")[6] for n in wide.tensors if n.startswith(f"{stem}.")}, key=int)
        for fused, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            pieces = [wide.tensors[f"{stem}.{e}.{p}.weight"] for e in experts for p in parts]
            shape = (len(experts), len(parts) * pieces[0][1][0], pieces[0][1][1])
            modelopt.tensors[f"{stem}.{fused}"] = ("BF16", shape, b"".join(data for _, _, data in pieces))
        for name in [n for n in modelopt.tensors if n.startswith(stem) and n.split(".")[6].isdigit()]:
            del modelopt.tensors[name]
    assert_fails(judge(modelopt), {"fp4.present", "fp4.ratio"}, "fused and wide")


@pytest.mark.parametrize("dialect", ["modelopt", "compressed"])
def test_claimed_but_nothing_was_done(request, judge, wide, dialect):
    artifact = request.getfixturevalue(dialect)
    artifact.tensors = dict(wide.tensors)
    receipt = judge(artifact)
    assert_fails(receipt, {"fp4.present", "fp4.ratio"}, "1.00x", "nothing is quantized, though the config claims")


def test_calibrated_but_never_packed(modelopt, wide, judge):
    """The seeds' artifact: BF16 weights and _amax statistics, a claim of NVFP4, exit 0."""
    modelopt.tensors = dict(wide.tensors)
    for layer in range(2):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = f"thinker.model.layers.{layer}.self_attn.{part}"
            modelopt.tensors[f"{module}.weight_quantizer._amax"] = ("BF16", (), bytes(2))
    receipt = judge(modelopt)
    assert_fails(receipt, {"tensors.complete", "fp4.present", "fp4.ratio"}, "1.00x", "8 _amax", "calibrated")


def test_scales_beside_wide_weights(wide, judge):
    """What llm-compressor leaves when the parent model is saved: uncompressed weights, scales, no config."""
    artifact = wide.copy()
    module = "thinker.model.layers.0.self_attn.q_proj"
    rows, columns = wide.tensors[f"{module}.weight"][1]
    artifact.tensors[f"{module}.weight_scale"] = ("BF16", (rows, columns // 16), bytes(rows * columns // 8))
    artifact.tensors[f"{module}.weight_global_scale"] = ("F32", (1,), bytes(4))
    assert_fails(judge(artifact), {"tensors.complete", "fp4.present", "fp4.ratio"}, f"{module}.weight_scale")


def encode_more(artifact: Artifact, wide: Artifact, module: str) -> None:
    tensor = reference.encode(widen(wide.tensors[f"{module}.weight"]))
    rows, half = tensor.packed.shape
    artifact.tensors[f"{module}.weight"] = ("U8", (rows, half), tensor.packed.tobytes())
    artifact.tensors[f"{module}.weight_scale"] = ("F8_E4M3", (rows, half // 8), tensor.block_scale.tobytes())
    artifact.tensors[f"{module}.weight_scale_2"] = ("F32", (), tensor.tensor_scale.tobytes())


@pytest.mark.parametrize("module", ["thinker.lm_head", "thinker.model.layers.0.mlp.gate", "talker.codec_head"])
def test_fp4_where_engines_build_wide(modelopt, wide, judge, module):
    encode_more(modelopt, wide, module)
    kept = {"thinker.lm_head": "lm_head", "talker.codec_head": "talker*"}.get(module, "*.mlp.gate")
    modelopt.quantization["ignore"].remove(kept)
    receipt = judge(modelopt)
    check = check_of(receipt, "fp4.coverage")
    assert check.verdict is Verdict.FAIL
    assert module in check.findings[0]


def test_what_a_recipe_asked_for_is_told_not_failed(modelopt, wide, judge):
    encode_more(modelopt, wide, "thinker.lm_head")
    modelopt.quantization["ignore"].remove("lm_head")
    modelopt.quantization["ignore"].append("talker.code_predictor.lm_head*")
    modelopt.side["omnifp4.json"] = modelopt.receipt(components=[{"name": "thinker.head", "scheme": "nvfp4"}])
    receipt = judge(modelopt)
    assert_fails(receipt, set())
    assert "as its recipe asked" in check_of(receipt, "fp4.coverage").summary


def test_fp4_embedding_is_no_linear(modelopt, wide, judge):
    encode_more(modelopt, wide, "thinker.model.embed_tokens")
    receipt = judge(modelopt)
    assert "it is no linear layer's weight" in check_of(receipt, "tensors.complete").findings[0]


def test_stray_shard(modelopt, tmp_path, judge):
    judge(modelopt)
    (tmp_path / "artifact" / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    assert_fails(verify(tmp_path / "artifact"), {"shards.index"}, "model-00001-of-00002.safetensors")


def test_wrong_total_size(modelopt, tmp_path):
    folder = modelopt.write(tmp_path / "artifact", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    assert_fails(verify(folder), {"shards.index"}, "total_size")


def test_flipped_bit_in_codes(modelopt, judge):
    name = f"{DOWN}.weight"
    modelopt.side["omnifp4.json"] = modelopt.receipt()
    codes = modelopt.bits(name)
    codes[7, 7] ^= 1
    modelopt.put(name, codes)
    assert_fails(judge(modelopt), {"shards.checksums"}, name)


def test_receipt_of_other_tensors(modelopt, judge):
    sums = json.loads(modelopt.receipt())
    del sums["tensors"][NORM]
    sums["tensors"]["gone"] = 7
    modelopt.side["omnifp4.json"] = json.dumps(sums).encode()
    assert_fails(judge(modelopt), {"shards.checksums"}, f"{NORM}: omnifp4.json has no", "gone")


def test_size_is_not_the_promised_one(modelopt, judge):
    modelopt.side["omnifp4.json"] = modelopt.receipt(weight_bytes=12345)
    assert_fails(judge(modelopt), {"fp4.ratio"}, "12,345")


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"a": NaN}', b"\xff"])
def test_unreadable_receipt(modelopt, judge, content):
    modelopt.side["omnifp4.json"] = content
    with pytest.raises(CheckpointError, match=r"omnifp4\.json"):
        judge(modelopt)


@pytest.mark.parametrize(
    "content",
    [{"tensors": [1]}, {"tensors": {"x": None}}, {"components": 3, "decisions": 7, "shards": [1], "weight_bytes": "x"}],
)
def test_garbage_in_the_receipt_is_no_crash(modelopt, judge, source_folder, content):
    modelopt.side["omnifp4.json"] = json.dumps(content).encode()
    judge(modelopt, source_folder)


def test_truncated_shard(modelopt, tmp_path):
    folder = modelopt.write(tmp_path / "artifact")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        verify(folder)


@pytest.mark.parametrize("name", ["vocab.json", "chat_template.jinja", "preprocessor_config.json", "merges.txt"])
def test_missing_side_file(modelopt, judge, source_folder, name):
    modelopt.side["omnifp4.json"] = modelopt.receipt()
    del modelopt.side[name]
    assert_fails(judge(modelopt, source_folder), {"files.side"}, name)


def test_other_tools_save_side_files_under_other_names(modelopt, judge, source_folder):
    modelopt.side["tokenizer.json"] = b"{}"
    del modelopt.side["vocab.json"], modelopt.side["merges.txt"]
    receipt = judge(modelopt, source_folder)
    assert failing(receipt) == {}
    assert "vocab.json of the source is not here" in check_of(receipt, "files.side").summary


def test_broken_side_file(modelopt, judge, source_folder):
    modelopt.side["vocab.json"] = b"{"
    assert_fails(judge(modelopt, source_folder), {"files.side"}, "vocab.json")


def test_changed_config(modelopt, judge, source_folder):
    modelopt.config["thinker_config"]["text_config"]["rope_theta"] = 10000
    modelopt.config["transformers_version"] = "0"
    assert_fails(judge(modelopt, source_folder), {"config.source"}, "thinker_config.text_config.rope_theta is 10000")


def fake_quant(wide: Artifact) -> Artifact:
    fake = wide.copy()
    codes = quantize(wide, MODELOPT)
    for name, (dtype, _, _) in codes.tensors.items():
        if dtype == "U8":
            scale = np.float32(codes.scalar(f"{name}_scale_2"))
            tensor = reference.NVFP4Tensor(codes.bits(name), codes.bits(f"{name}_scale"), scale)
            fake.tensors[name] = ("BF16", wide.tensors[name][1], narrow(reference.decode(tensor)))
    assert widen(fake.tensors[f"{DOWN}.weight"]).any()
    return fake


def test_fake_quant_against_its_source(wide, judge, source_folder):
    fake = fake_quant(wide)
    fake.side["omnifp4.json"] = fake.receipt(output_format="fake-quant")
    receipt = judge(fake, source_folder)
    assert_fails(receipt, set())
    assert 0.007 < receipt.relative_squared_error < 0.0105
    fake.put(f"{DOWN}.weight", np.zeros_like(fake.bits(f"{DOWN}.weight")))
    fake.put(NORM, fake.bits(NORM) ^ 1)
    fake.side["omnifp4.json"] = fake.receipt(output_format="fake-quant")
    assert_fails(judge(fake, source_folder), {"values.error", "values.untouched"}, f"{DOWN}.weight", NORM)


def test_fake_quant(wide, judge):
    fake = fake_quant(wide)
    fake.side["omnifp4.json"] = fake.receipt(output_format="fake-quant")
    receipt = judge(fake)
    assert_fails(receipt, set())
    assert receipt.dialect == "fake-quant"
    assert "nothing shrinks" in check_of(receipt, "fp4.fake").summary
    fake.tensors[f"{DOWN}.weight"] = wide.tensors[f"{DOWN}.weight"]
    fake.side["omnifp4.json"] = fake.receipt(output_format="fake-quant")
    assert_fails(judge(fake), {"fp4.fake"}, f"{DOWN}.weight")
    del fake.side["omnifp4.json"]
    assert_fails(judge(fake), {"fp4.present", "fp4.ratio"}, "1.00x")
