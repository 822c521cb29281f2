"""Artifacts with FP8, MXFP4 and INT8 linears from one dialect to the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnifp4.conversion import convert, repair
from omnifp4.errors import CheckpointError, RecipeError
from omnifp4.receipt.base import Verdict
from omnifp4.verification import verify


def test_there_and_back_is_byte_identical(mixed_artifacts: dict[str, Path], tiny_omni: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    convert(mixed_artifacts["modelopt"], there, "compressed-tensors", threads=2)
    proof = verify(there, against=tiny_omni)
    assert proof.verdict is Verdict.PASS
    assert proof.schemes == verify(mixed_artifacts["modelopt"]).schemes
    assert len(json.loads((there / "config.json").read_text())["quantization_config"]["config_groups"]) == 4
    convert(there, back, "modelopt", threads=2)
    for name in ("model.safetensors", "config.json"):
        assert (back / name).read_bytes() == (mixed_artifacts["modelopt"] / name).read_bytes()


def test_an_artifact_without_any_nvfp4(tiny_omni: Path, tmp_path: Path) -> None:
    from omnifp4 import quantize

    components = ("thinker.attention=fp8", "thinker.experts=mxfp4")
    made, there = tmp_path / "made", tmp_path / "there"
    quantize(tiny_omni, made, components=components, format="compressed-tensors", threads=2, check=False)
    convert(made, there, "modelopt", threads=2)
    proof = verify(there, against=tiny_omni)
    assert (proof.verdict, proof.dialect) == (Verdict.PASS, "modelopt")
    assert proof.schemes.keys() == {"fp8", "mxfp4"}
    convert(there, tmp_path / "back", "compressed-tensors", threads=2)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (made / name).read_bytes()


def test_what_the_other_dialect_has_no_form_for(mixed_artifacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is int8, for which modelopt has no form that engines read"):
        convert(mixed_artifacts["compressed-tensors"], tmp_path / "out", "modelopt")
    assert not list(tmp_path.iterdir())


def test_repair_leaves_other_schemes_alone(mixed_artifacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"in fp8 and mxfp4, and repair mends NVFP4 alone"):
        repair(mixed_artifacts["modelopt"], tmp_path / "out")
    assert not list(tmp_path.iterdir())
