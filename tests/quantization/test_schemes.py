"""``--component NAME=fp8`` and its like: what a plan says, what is written, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import omnifp4
from omnifp4.checkpoint.artifact import find_coded, find_linears
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.errors import RecipeError
from omnifp4.formats.scheme import Scheme
from omnifp4.receipt.base import Verdict
from small_checkpoints import MIXED_COMPONENTS

BITS = {"nvfp4": 4.5, "mxfp4": 4.25, "fp8": 8.0, "int8": 8.0, "bf16": 16.0}


@pytest.mark.parametrize("dialect", MIXED_COMPONENTS)
def test_the_plan_is_what_is_written(tiny_omni: Path, mixed_artifacts: dict[str, Path], dialect: str) -> None:
    plan = omnifp4.plan(tiny_omni, components=MIXED_COMPONENTS[dialect], format=dialect)
    checkpoint = open_checkpoint(mixed_artifacts[dialect])
    assert plan.weight_bytes_after == checkpoint.weight_bytes
    asked = dict(text.split("=") for text in MIXED_COMPONENTS[dialect])
    rows = {row.name: row for row in plan.components}
    for name, scheme in asked.items():
        row = rows[name]
        assert row.scheme == scheme
        assert row.quantized_parameters > 0.95 * row.parameters
        assert row.fp4_parameters == (row.quantized_parameters if scheme in ("nvfp4", "mxfp4") else 0)
        # What is above the format's own bits: scales of short rows, biases, headers.
        assert 1 <= row.bytes_after * 8 / row.parameters / BITS[scheme] < 1.15
    receipt = json.loads((mixed_artifacts[dialect] / "omnifp4.json").read_text())
    assert set(receipt["schemes"].values()) == set(asked.values()) - {"nvfp4"}
    assert receipt["schemes"].keys() < receipt["decisions"].keys()


@pytest.mark.parametrize("dialect", MIXED_COMPONENTS)
def test_each_linear_is_of_the_scheme_of_its_component(mixed_artifacts: dict[str, Path], dialect: str) -> None:
    tensors = open_checkpoint(mixed_artifacts[dialect]).tensors
    coded, nvfp4 = find_coded(tensors), find_linears(tensors)
    assert not coded.keys() & nvfp4.keys()
    assert not [problem for linear in coded.values() for problem in linear.problems()]
    receipt = json.loads((mixed_artifacts[dialect] / "omnifp4.json").read_text())
    assert {f"{name}.weight": linear.scheme.value for name, linear in coded.items()} == receipt["schemes"]
    assert all(linear.scale is not None for linear in coded.values())


def test_what_a_dialect_cannot_express_is_refused_before_any_work(tiny_omni: Path, tmp_path: Path) -> None:
    for act in (
        lambda: omnifp4.plan(tiny_omni, components=["talker.experts=int8"]),
        lambda: omnifp4.quantize(tiny_omni, tmp_path / "out", components=["talker.experts=int8"]),
    ):
        with pytest.raises(RecipeError, match="modelopt has no form of int8") as refused:
            act()
        assert refused.value.hint == "choose --format compressed-tensors"
    assert not list(tmp_path.iterdir())


def test_the_plan_says_what_engines_do_not_read(tiny_omni: Path) -> None:
    plan = omnifp4.plan(tiny_omni, components=["talker.experts=fp8", "talker.attention=mxfp4"])
    assert any("no experts in fp8" in note for note in plan.notes)
    assert any("does not read mxfp4" in note for note in plan.notes)
    other = omnifp4.plan(tiny_omni, components=["talker.experts=fp8"], format="compressed-tensors")
    assert not any("fp8 with scales" in note for note in other.notes)


def test_a_width_that_a_scheme_cannot_hold_stays_wide(tmp_path: Path) -> None:
    from omnifp4.tiny import write_random_checkpoint
    from small_checkpoints import LLAMA

    write_random_checkpoint(LLAMA | {"intermediate_size": 80}, tmp_path / "llama", seed=0)
    plan = omnifp4.plan(tmp_path / "llama", components=["thinker.mlp=mxfp4"])
    assert any("width 80 is not a multiple of 32" in reason for reason in plan.left_out.values())
    assert Scheme.INT8.width_multiple == 4
    assert not omnifp4.plan(tmp_path / "llama", components=["thinker.mlp=int8"], format="compressed-tensors").left_out


def test_experts_of_which_only_some_widths_fit_are_refused(tmp_path: Path) -> None:
    from omnifp4.tiny import write_random_checkpoint
    from small_checkpoints import QWEN3_MOE

    write_random_checkpoint(QWEN3_MOE, tmp_path / "moe", seed=0)
    with pytest.raises(RecipeError, match=r"'thinker.experts' cannot be mxfp4: the width 48 of .*down_proj"):
        omnifp4.plan(tmp_path / "moe", components=["thinker.experts=mxfp4"])
    assert omnifp4.plan(tmp_path / "moe", components=["thinker.experts=mxfp4"], format="fake-quant").left_out
    assert not omnifp4.plan(tmp_path / "moe", components=["thinker.experts=fp8"]).left_out


def test_a_run_in_the_same_schemes_writes_the_same_bytes(
    tiny_omni: Path, mixed_artifacts: dict[str, Path], tmp_path: Path
) -> None:
    dialect = "compressed-tensors"
    omnifp4.quantize(
        tiny_omni, tmp_path / "out", threads=1, components=MIXED_COMPONENTS[dialect], format=dialect, check=False
    )
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (mixed_artifacts[dialect] / name).read_bytes()


@pytest.mark.parametrize("kind", ["qwen3_vl_moe_fused", "qwen3_vl_moe_transposed"])
def test_fused_experts(small_folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """From 3-D tensors come the linears of separate ones; a fake-quant twin keeps the 3-D form, and is proved as such."""
    components = ("thinker.experts=fp8", "thinker.attention=mxfp4")
    for name, source in (("fused", small_folders[kind]), ("apart", small_folders["qwen3_vl_moe"])):
        omnifp4.quantize(source, tmp_path / name, components=components, threads=1)
    proof = omnifp4.verify(tmp_path / "fused", against=small_folders["qwen3_vl_moe"])
    assert proof.verdict is Verdict.PASS
    assert set(proof.schemes) == {"fp8", "mxfp4"}
    sums = [json.loads((tmp_path / name / "omnifp4.json").read_text())["tensors"] for name in ("fused", "apart")]
    assert sums[0] == sums[1]
    omnifp4.quantize(small_folders[kind], tmp_path / "fake", components=components, format="fake-quant", threads=1)
    fake = omnifp4.verify(tmp_path / "fake", against=small_folders[kind])
    assert fake.verdict is Verdict.PASS
    assert any(
        "FP8, " in check.summary or ", FP8" in check.summary for check in fake.checks if check.name == "fp4.fake"
    )
