"""Damage that needs the original: said without it, recomputed with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damaging import CODES, SCALES, Damaged

from omnifp4 import quantize
from omnifp4.conversion import repair
from omnifp4.errors import CheckpointError
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.repair import Effect, RepairOutcome
from omnifp4.verification import verify
from small_checkpoints import (
    QWEN3_MOE,
    QWEN3_VL_MOE,
    Tensor,
    Tensors,
    fused,
    random_tensors,
    read_tensors,
    write_checkpoint,
)

EXPERT = "model.layers.0.mlp.experts.1"
GATE, UP, DOWN = (f"{EXPERT}.{part}_proj" for part in ("gate", "up", "down"))
NORM = "model.layers.1.input_layernorm.weight"

Damage = Callable[[Damaged], object]


def zero_wide(artifact: Damaged, value: int) -> None:
    tensor = artifact.tensors[NORM]
    bits = tensor.bits.copy()
    bits[3] = value
    artifact.tensors[NORM] = Tensor(tensor.dtype, bits)


def transpose_codes(artifact: Damaged) -> None:
    name = DOWN + CODES[artifact.dialect]
    artifact.tensors[name] = Tensor("U8", np.ascontiguousarray(artifact.tensors[name].bits.T))


DAMAGE: dict[str, tuple[Damage, str, str]] = {
    "tensor scale 0": (lambda a: a.set_tensor_scale(DOWN, 0.0), "scales.tensor", DOWN),
    "tensor scale NaN": (lambda a: a.set_tensor_scale(UP, float("nan")), "scales.tensor", UP),
    "tensor scale inf": (lambda a: a.set_tensor_scale(DOWN, float("inf")), "scales.tensor", DOWN),
    "tensor scale negative": (lambda a: a.set_tensor_scale(DOWN, -1.0), "scales.tensor", DOWN),
    "tensor scale absurd": (lambda a: a.set_tensor_scale(DOWN, 2.5e30), "scales.tensor", DOWN),
    "tensor scale missing": (lambda a: a.drop(DOWN + SCALES[a.dialect]), "linear.parts", DOWN),
    "block scales missing": (lambda a: a.drop(f"{UP}.weight_scale"), "linear.parts", UP),
    "all NaN": (lambda a: a.block_scales(UP).fill(0x7F), "scales.block", UP),
    "all zero": (lambda a: a.block_scales(UP).fill(0), "scales.block", UP),
    "codes missing": (lambda a: a.drop(DOWN + CODES[a.dialect]), "tensor.missing", DOWN),
    "codes transposed": (transpose_codes, "linear.parts", DOWN),
    "a norm missing": (lambda a: a.drop(NORM), "tensor.missing", NORM),
    "a norm with infinity": (lambda a: zero_wide(a, 0x7F80), "wide.nonfinite", NORM),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_said_without_the_original_and_mended_with_it(damaged: Damaged, moe: Path, tmp_path: Path, damage: str) -> None:
    apply, kind, subject = DAMAGE[damage]
    apply(damaged)
    source, out = damaged.write(tmp_path / "in", shards=2), tmp_path / "out"
    receipt = repair(source, out)
    assert receipt.outcome is RepairOutcome.NOT_MENDED
    assert (kind, subject) in {(entry.kind, entry.subject) for entry in receipt.unmended} or damage == "codes missing"
    assert all("--source" in entry.needs for entry in receipt.unmended)
    assert not list(tmp_path.glob("out*"))
    receipt = repair(source, out, with_source=moe)
    assert receipt.outcome is RepairOutcome.MENDED, receipt.unmended
    assert receipt.original == "original"
    proof = verify(out, against=moe)
    assert proof.verdict is Verdict.PASS, [check.findings for check in proof.checks]


def swap(artifact: Damaged) -> None:
    codes = artifact.codes(DOWN)
    codes[...] = (codes >> 4) | (codes << 4)


SILENT: dict[str, tuple[Damage, str]] = {
    "codes of a row are gone": (lambda a: a.codes(DOWN)[:16].fill(0), "codes.wrong"),
    "another tensor scale": (lambda a: a.set_tensor_scale(DOWN, float(a.tensor_scale(DOWN)) * 3), "codes.wrong"),
    "swapped codes": (swap, "codes.swapped"),
    "a norm": (lambda a: zero_wide(a, 0x3F00), "wide.differs"),
}


@pytest.mark.parametrize("damage", SILENT)
def test_what_only_the_original_shows(damaged: Damaged, moe: Path, tmp_path: Path, damage: str) -> None:
    right = damaged.copy()
    apply, kind = SILENT[damage]
    apply(damaged)
    source, out = damaged.write(tmp_path / "in"), tmp_path / "out"
    assert repair(source, out).outcome is RepairOutcome.NOTHING_TO_MEND
    receipt = repair(source, out, with_source=moe)
    assert [entry.kind for entry in receipt.mended] == [kind]
    assert verify(out, against=moe).verdict is Verdict.PASS
    # The same rule and the same weights, so the very bytes come back.
    assert all(tensor.same_as(right.tensors[name]) for name, tensor in Damaged(out).tensors.items())


def test_checksums_find_what_nothing_else_shows(moe_artifacts: dict[str, Path], moe: Path, tmp_path: Path) -> None:
    artifact = Damaged(moe_artifacts["modelopt"], receipt=True)
    artifact.codes(DOWN)[0, 0] ^= 1
    source, out = artifact.write(tmp_path / "in"), tmp_path / "out"
    receipt = repair(source, out)
    assert [(entry.kind, entry.subject) for entry in receipt.unmended] == [("tensor.checksum", DOWN)]
    receipt = repair(source, out, with_source=moe)
    assert receipt.mended[0].effect is Effect.RECOMPUTED
    assert verify(out, against=moe).verdict is Verdict.PASS


@pytest.mark.parametrize(("config", "transposed"), [(QWEN3_MOE, False), (QWEN3_VL_MOE, True)])
def test_an_original_with_fused_experts(tmp_path: Path, config: dict[str, Any], transposed: bool) -> None:
    tensors = random_tensors(tmp_path, config)
    original = write_checkpoint(tmp_path / "original", config, fused(config, tensors, transposed=transposed))
    quantize(original, tmp_path / "artifact", threads=1)
    artifact = Damaged(tmp_path / "artifact")
    right = artifact.copy()
    gate, up = (next(m for m in artifact.modules if m.endswith(f"experts.1.{part}_proj")) for part in ("gate", "up"))
    artifact.block_scales(gate).fill(0x7F)
    receipt = repair(artifact.write(tmp_path / "in"), tmp_path / "out", with_source=original)
    assert {entry.subject for entry in receipt.mended} == {gate, up}
    assert all(tensor.same_as(right.tensors[name]) for name, tensor in Damaged(tmp_path / "out").tensors.items())


def test_wide_experts_come_back_out_of_fused_ones(moe: Path, tmp_path: Path) -> None:
    quantize(moe, tmp_path / "artifact", components=["thinker.experts=bf16"], threads=1)
    artifact = Damaged(tmp_path / "artifact")
    right = artifact.copy()
    artifact.drop(f"{UP}.weight")
    original = write_checkpoint(tmp_path / "fused", QWEN3_MOE, fused(QWEN3_MOE, read_tensors(moe), transposed=False))
    receipt = repair(artifact.write(tmp_path / "in"), tmp_path / "out", with_source=original)
    assert [(entry.kind, entry.subject) for entry in receipt.mended] == [("tensor.missing", f"{UP}.weight")]
    assert all(tensor.same_as(right.tensors[name]) for name, tensor in Damaged(tmp_path / "out").tensors.items())


def test_mismatched_scales_are_recomputed(damaged: Damaged, moe: Path, tmp_path: Path) -> None:
    damaged.set_tensor_scale(GATE, float(damaged.tensor_scale(GATE)) * 1.3)
    receipt = repair(damaged.write(tmp_path / "in"), tmp_path / "out", with_source=moe)
    assert {entry.subject for entry in receipt.mended} == {GATE, UP}
    assert all(entry.effect is Effect.RECOMPUTED for entry in receipt.mended)
    assert all(0.004 < (entry.relative_squared_error or 0) < 0.012 for entry in receipt.mended)
    assert verify(tmp_path / "out", against=moe).verdict is Verdict.PASS


def test_what_was_never_quantized_is_not_repaired(moe: Path, damaged: Damaged, tmp_path: Path) -> None:
    wide = Damaged.__new__(Damaged)
    wide.config = damaged.config
    wide.tensors = random_tensors(tmp_path / "random", QWEN3_MOE)
    wide.files = {}
    receipt = repair(wide.write(tmp_path / "in"), tmp_path / "out", with_source=moe)
    assert [entry.kind for entry in receipt.unmended] == ["nothing.quantized"]
    assert "omnifp4 quantize" in receipt.unmended[0].needs
    assert not list(tmp_path.glob("out*"))


def test_an_unknown_tensor_is_not_thrown_away(damaged: Damaged, moe: Path, tmp_path: Path) -> None:
    damaged.tensors["model.layers.0.adapter.weight"] = Tensor("F32", np.ones((4, 4), dtype="<f4"))
    receipt = repair(damaged.write(tmp_path / "in"), tmp_path / "out", with_source=moe)
    assert [entry.kind for entry in receipt.unmended] == ["tensor.unknown"]


def widen(artifact: Damaged, wide: Tensors, *modules: str) -> None:
    for module in modules:
        artifact.drop(module + CODES[artifact.dialect], f"{module}.weight_scale", module + SCALES[artifact.dialect])
        artifact.tensors[f"{module}.weight"] = wide[f"{module}.weight"]


def test_an_expert_that_was_left_wide_is_encoded_from_itself(damaged: Damaged, moe: Path, tmp_path: Path) -> None:
    right = damaged.copy()
    widen(damaged, read_tensors(moe), GATE, UP, DOWN)
    source = damaged.write(tmp_path / "in")
    assert verify(source).verdict is Verdict.FAIL
    receipt = repair(source, tmp_path / "out")
    assert {(entry.kind, entry.subject) for entry in receipt.mended} >= {("fp4.mixed", m) for m in (GATE, UP, DOWN)}
    assert verify(tmp_path / "out", against=moe).verdict is Verdict.PASS
    out = Damaged(tmp_path / "out")
    assert all(tensor.same_as(right.tensors[name]) for name, tensor in out.tensors.items())


def test_half_a_fused_pair_left_wide_needs_the_original(damaged: Damaged, moe: Path, tmp_path: Path) -> None:
    widen(damaged, read_tensors(moe), UP)
    source = damaged.write(tmp_path / "in")
    receipt = repair(source, tmp_path / "out")
    assert [(entry.kind, entry.subject) for entry in receipt.unmended] == [("fp4.mixed", UP)]
    receipt = repair(source, tmp_path / "out", with_source=moe)
    assert {entry.subject for entry in receipt.mended if entry.kind == "fp4.mixed"} == {UP}
    assert verify(tmp_path / "out", against=moe).verdict is Verdict.PASS


def test_an_original_of_another_model_is_refused(damaged: Damaged, tiny_omni: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not its original"):
        repair(damaged.write(tmp_path / "in"), tmp_path / "out", with_source=tiny_omni)


def test_an_original_that_is_quantized_is_refused(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already quantized"):
        repair(moe_artifacts["modelopt"], tmp_path / "out", with_source=moe_artifacts["modelopt"])


def test_settings_and_files_come_from_the_original(
    omni_artifacts: dict[str, Path], tiny_omni: Path, tmp_path: Path
) -> None:
    artifact = Damaged(omni_artifacts["modelopt"], receipt=True)
    text = artifact.config["thinker_config"]["text_config"]
    was = text["rms_norm_eps"]
    text["rms_norm_eps"] = 0.5
    artifact.files["tokenizer_config.json"] = b'{"torn": '
    del artifact.files["vocab.json"]
    source = artifact.write(tmp_path / "in")
    assert verify(source, against=tiny_omni).verdict is Verdict.FAIL
    receipt = repair(source, tmp_path / "out", with_source=tiny_omni)
    assert sorted((entry.kind, entry.subject) for entry in receipt.mended) == [
        ("config.source", "thinker_config.text_config.rms_norm_eps"),
        ("files.side", "tokenizer_config.json"),
        ("files.side", "vocab.json"),
    ]
    assert verify(tmp_path / "out", against=tiny_omni).verdict is Verdict.PASS
    assert Damaged(tmp_path / "out").config["thinker_config"]["text_config"]["rms_norm_eps"] == was
