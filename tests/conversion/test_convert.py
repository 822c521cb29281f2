"""From one dialect to the other and back: the same codes, the same decoded weights, and a config that engines read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from damaging import INPUTS, SCALES, Damaged, read_json, same_values

from omnifp4.conversion import convert
from omnifp4.errors import CheckpointError, OutputError, RecipeError
from omnifp4.receipt.base import Verdict
from omnifp4.verification import verify
from small_checkpoints import Tensor, folder_bytes

OTHER = {"modelopt": "compressed-tensors", "compressed-tensors": "modelopt"}
WEIGHTS = (".safetensors", "config.json", ".index.json")
PROJECTION = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize("dialect", OTHER)
def test_there_and_back_is_byte_identical(
    omni_artifacts: dict[str, Path], tiny_omni: Path, tmp_path: Path, dialect: str
) -> None:
    source = omni_artifacts[dialect]
    there = convert(source, tmp_path / "there", OTHER[dialect], threads=2)
    convert(tmp_path / "there", tmp_path / "back", dialect, threads=1)
    before, after = folder_bytes(source), folder_bytes(tmp_path / "back")
    twin = folder_bytes(omni_artifacts[OTHER[dialect]])
    converted = folder_bytes(tmp_path / "there")
    assert len([name for name in before if name.endswith(".safetensors")]) > 1
    assert before.keys() == after.keys() == converted.keys()
    for name in before:
        if name not in {"omnifp4.json", "README.md"}:
            assert after[name] == before[name], name
            assert converted[name] == twin[name], f"{name}: what quantize writes in that format"
    assert there.exact_tensor_scales == there.fp4_linears > 0
    assert there.nudged_tensor_scales == 0
    for folder in (tmp_path / "there", tmp_path / "back"):
        assert verify(folder, against=tiny_omni).verdict is Verdict.PASS


@pytest.mark.parametrize("dialect", OTHER)
def test_decoded_weights_stay_for_scales_that_are_no_powers_of_two(
    moe_artifacts: dict[str, Path], moe: Path, tmp_path: Path, dialect: str
) -> None:
    source = moe_artifacts[f"{dialect}-max"]
    receipt = convert(source, tmp_path / "out", OTHER[dialect])
    assert receipt.exact_tensor_scales < receipt.fp4_linears
    before, after = Damaged(source), Damaged(tmp_path / "out")
    assert same_values(before.values(), after.values())
    assert receipt.rounding_differs == {}
    assert verify(tmp_path / "out", against=moe).verdict is Verdict.PASS


def test_scales_computed_in_bf16_come_back_exactly(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    artifact = Damaged(moe_artifacts["compressed-tensors-max"])
    for module in artifact.modules:
        bits = np.float32(artifact.tensor_scale(module)).view(np.uint32) & np.uint32(0xFFFF0000)
        artifact.set_tensor_scale(module, float(bits.view(np.float32)))
    source = artifact.write(tmp_path / "source")
    convert(source, tmp_path / "there", "modelopt")
    convert(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    back = Damaged(tmp_path / "back")
    assert all(back.tensors[name].same_as(tensor) for name, tensor in artifact.tensors.items())


def test_input_scales_of_w4a4(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    artifact = Damaged(moe_artifacts["modelopt"])
    artifact.make_w4a4(0.0123)
    receipt = convert(artifact.write(tmp_path / "in"), tmp_path / "out", "compressed-tensors")
    out = Damaged(tmp_path / "out")
    assert receipt.activations == "W4A4"
    assert out.quantization["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"
    stored = out.tensors[PROJECTION + INPUTS["compressed-tensors"]]
    assert stored.bits.shape == (1,)
    assert stored.bits[0] == np.float32(1) / np.float32(0.0123)
    assert verify(tmp_path / "out").verdict is Verdict.PASS


def test_fp8_cache_is_carried_over(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    artifact = Damaged(moe_artifacts["modelopt"])
    artifact.quantization["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    for layer in range(2):
        for which in "kv":
            name = f"model.layers.{layer}.self_attn.{which}_proj.{which}_scale"
            artifact.tensors[name] = Tensor("F32", np.full((), 0.7 + layer, dtype="<f4"))
    convert(artifact.write(tmp_path / "in"), tmp_path / "there", "compressed-tensors")
    there = Damaged(tmp_path / "there")
    assert there.tensors["model.layers.1.self_attn.k_scale"].bits == np.full((1,), 1.7, dtype="<f4")
    assert there.quantization["kv_cache_scheme"]["strategy"] == "tensor"
    convert(tmp_path / "there", tmp_path / "back", "modelopt")
    back = Damaged(tmp_path / "back")
    assert back.quantization["kv_cache_scheme"] == artifact.quantization["kv_cache_scheme"]
    assert all(back.tensors[name].same_as(tensor) for name, tensor in artifact.tensors.items())


def test_other_caches_are_refused(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    artifact = Damaged(moe_artifacts["modelopt"])
    artifact.quantization["kv_cache_scheme"] = {"dynamic": False, "num_bits": 4, "type": "float"}
    with pytest.raises(CheckpointError, match="key/value cache"):
        convert(artifact.write(tmp_path / "in"), tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.glob("out*"))


def test_auto_rounds_own_config_becomes_either_dialect(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    artifact = Damaged(moe_artifacts["compressed-tensors"])
    artifact.config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:llm_compressor",
        "bits": 4,
        "data_type": "nv_fp",
        "group_size": 16,
    }
    artifact.files["quantization_config.json"] = b"{}"
    source = artifact.write(tmp_path / "in")
    for target in OTHER:
        out = tmp_path / target
        convert(source, out, target)
        assert verify(out).verdict is Verdict.PASS
        assert not (out / "quantization_config.json").exists()
        assert read_json(out / "config.json") == read_json(moe_artifacts[target] / "config.json")


def test_ignore_is_made_from_the_files(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    artifact = Damaged(moe_artifacts["modelopt"])
    artifact.quantization["ignore"] = ["nothing*"]
    artifact.files["hf_quant_config.json"] = json.dumps(
        {"producer": {}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": []}}
    ).encode()
    receipt = convert(artifact.write(tmp_path / "in"), tmp_path / "out", "compressed-tensors")
    twin = read_json(moe_artifacts["compressed-tensors"] / "config.json")
    assert read_json(tmp_path / "out" / "config.json") == twin
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert any("hf_quant_config.json" in note for note in receipt.notes)


def test_the_receipt_goes_on(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    source = moe_artifacts["modelopt"]
    convert(source, tmp_path / "there", "compressed-tensors")
    convert(tmp_path / "there", tmp_path / "back", "modelopt")
    before, after = read_json(source / "omnifp4.json"), read_json(tmp_path / "back" / "omnifp4.json")
    there = read_json(tmp_path / "there" / "omnifp4.json")
    assert there["output_format"] == "compressed-tensors"
    assert [change["receipt"] for change in after["changes"]] == ["conversion", "conversion"]
    assert [change["to_format"] for change in after["changes"]] == ["compressed-tensors", "modelopt"]
    assert after["decisions"] == before["decisions"]
    assert after["tensors"] == before["tensors"]
    assert (tmp_path / "there" / "README.md").read_text().startswith((source / "README.md").read_text())


def test_an_artifact_without_a_receipt_gets_the_conversion(damaged: Damaged, tmp_path: Path) -> None:
    damaged.files.pop("README.md")
    convert(damaged.write(tmp_path / "in"), tmp_path / "out", OTHER[damaged.dialect])
    assert read_json(tmp_path / "out" / "omnifp4.json")["receipt"] == "conversion"
    assert "## Converted" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out").verdict is Verdict.PASS


def test_shards_can_be_divided_anew(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    receipt = convert(moe_artifacts["modelopt"], tmp_path / "out", "compressed-tensors", max_shard_bytes=30_000)
    assert len(receipt.shards) > 2
    assert verify(tmp_path / "out").verdict is Verdict.PASS


def test_damage_is_refused_with_the_way_out(damaged: Damaged, tmp_path: Path) -> None:
    gate, up = (f"model.layers.1.mlp.experts.2.{part}_proj" for part in ("gate", "up"))
    cases = {}
    cases["share one tensor scale"] = damaged.copy()
    cases["share one tensor scale"].set_tensor_scale(gate, float(damaged.tensor_scale(up)) * 2)
    cases["1 NaN of"] = damaged.copy()
    cases["1 NaN of"].block_scales(up)[3, 1] = 0x7F
    cases["the tensor scale is missing"] = damaged.copy()
    cases["the tensor scale is missing"].drop(up + SCALES[damaged.dialect])
    cases["block scales are missing"] = damaged.copy()
    cases["block scales are missing"].drop(f"{up}.weight_scale")
    cases["W4A4"] = damaged.copy()
    cases["W4A4"].make_w4a4()
    cases["W4A4"].drop(gate + INPUTS[damaged.dialect])
    cases["is missing"] = damaged.copy()
    cases["is missing"].drop("model.norm.weight")
    for words, artifact in cases.items():
        source = artifact.write(tmp_path / "in")
        with pytest.raises(CheckpointError, match=words) as caught:
            convert(source, tmp_path / "out", OTHER[damaged.dialect])
        assert "omnifp4 repair" in str(caught.value)
        assert not list(tmp_path.glob("out*"))


def test_wrong_usage(moe: Path, moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    source = moe_artifacts["modelopt"]
    with pytest.raises(RecipeError, match="already"):
        convert(source, tmp_path / "out", "modelopt")
    with pytest.raises(RecipeError, match="known are"):
        convert(source, tmp_path / "out", "gguf")
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert(moe, tmp_path / "out", "modelopt")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        convert(source, tmp_path / "out", "compressed-tensors")
    assert not list((tmp_path / "out").iterdir())
