"""Damage that can be mended from the artifact alone: what is done, what is said, and that the result is right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damaging import INPUTS, Damaged, read_json

from omnifp4.conversion import repair
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.repair import Effect, RepairOutcome, RepairReceipt
from omnifp4.verification import verify
from small_checkpoints import Tensor

EXPERT = "model.layers.0.mlp.experts.1"
GATE, UP, DOWN = (f"{EXPERT}.{part}_proj" for part in ("gate", "up", "down"))
QUERY, KEY, VALUE = (f"model.layers.1.self_attn.{part}_proj" for part in "qkv")

Mended = Callable[..., tuple[RepairReceipt, Damaged]]


@pytest.fixture
def mended(tmp_path: Path) -> Mended:
    """Writes a damaged artifact, checks that verify sees the damage, repairs it, and checks that verify passes."""

    def run(artifact: Damaged, *, verify_sees_it: bool = True) -> tuple[RepairReceipt, Damaged]:
        source = artifact.write(tmp_path / "in")
        assert verify(source).verdict is (Verdict.FAIL if verify_sees_it else Verdict.PASS)
        receipt = repair(source, tmp_path / "out", threads=1)
        assert receipt.outcome is RepairOutcome.MENDED, receipt.unmended
        proof = verify(tmp_path / "out")
        assert proof.verdict is Verdict.PASS, [check.findings for check in proof.checks]
        again = repair(tmp_path / "out", tmp_path / "again")
        assert again.outcome is RepairOutcome.NOTHING_TO_MEND, again.mended
        return receipt, Damaged(tmp_path / "out")

    return run


def kinds(receipt: RepairReceipt) -> dict[str, int]:
    found = [mend.kind for mend in receipt.mended]
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


def test_an_undamaged_artifact_is_left_alone(
    moe_artifacts: dict[str, Path], omni_artifacts: dict[str, Path], tmp_path: Path
) -> None:
    for source in (*moe_artifacts.values(), *omni_artifacts.values()):
        receipt = repair(source, tmp_path / "out")
        assert receipt.outcome is RepairOutcome.NOTHING_TO_MEND
        assert not receipt.mended
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", [(GATE, UP), (QUERY, KEY, VALUE)])
def test_tensor_scales_that_differ_by_powers_of_two_cost_nothing(
    damaged: Damaged, mended: Mended, group: tuple[str, ...]
) -> None:
    """The same weights under another tensor scale: four times as large, block scales a quarter."""
    before = damaged.values()
    for module in group[1:]:
        factor = 0.25 if damaged.dialect == "compressed-tensors" else 4.0
        damaged.set_tensor_scale(module, float(damaged.tensor_scale(module)) * factor)
        scales = damaged.block_scales(module)
        assert (scales > 16).all(), "so that a quarter is exact"
        scales -= 16
    receipt, after = mended(damaged)
    assert kinds(receipt) == {"scales.shared": 1}
    assert receipt.mended[0].subject == group[0]
    assert receipt.mended[0].relative_squared_error == 0.0
    assert all(np.array_equal(value, before[module]) for module, value in after.values().items())
    assert len({float(after.tensor_scale(module)) for module in group}) == 1


@pytest.mark.parametrize("factor", [1.3, 0.61])
def test_other_tensor_scales_are_reconciled_by_rounding(damaged: Damaged, mended: Mended, factor: float) -> None:
    damaged.set_tensor_scale(GATE, float(damaged.tensor_scale(GATE)) * factor)
    before = damaged.values()
    receipt, after = mended(damaged)
    (mend,) = receipt.mended
    assert mend.effect is Effect.ROUNDED
    assert mend.subject in (GATE, UP)
    assert mend.relative_squared_error is not None
    old, new = (
        (bits[mend.subject].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        for bits in (before, after.values())
    )
    error = np.square(old - new).sum() / np.square(old).sum()
    assert mend.relative_squared_error == pytest.approx(error, rel=0.1), "BF16 rounding aside"
    assert 0 < error < 6e-3
    untouched = [module for module in before if module != mend.subject]
    assert all(np.array_equal(before[module], after.value(module)) for module in untouched)


def test_block_scales_are_made_finite_and_positive(damaged: Damaged, mended: Mended) -> None:
    scales, codes = damaged.block_scales(DOWN), damaged.codes(DOWN)
    codes[2, 0:8] = 0x80
    scales[2, 0] = 0x00
    codes[3, 8:16] = 0x08
    scales[3, 1] = 0xFF
    was = int(scales[5, 2])
    scales[5, 2] |= 0x80
    before = damaged.value(DOWN)
    receipt, after = mended(damaged)
    (mend,) = receipt.mended
    assert (mend.kind, mend.subject, mend.effect) == ("scales.block", DOWN, Effect.ESTIMATED)
    assert "1 zeros over zero codes" in mend.action
    assert "1 lost their sign bit" in mend.action
    assert "1 NaN over zero codes" in mend.action
    new = after.tensors[f"{DOWN}.weight_scale"].bits
    assert (new[2, 0], new[3, 1], new[5, 2]) == (1, 1, was)
    same = np.ones(new.shape, dtype=bool)
    same[[2, 3, 5], [0, 1, 2]] = False
    blocks = (-1, new.shape[1], 16)
    assert np.array_equal(after.value(DOWN).reshape(blocks)[same], before.reshape(blocks)[same])
    assert not (after.value(DOWN).reshape(blocks)[3, 1] & 0x7FFF).any()


def test_a_zero_over_codes_keeps_decoding_to_zero(damaged: Damaged, mended: Mended) -> None:
    damaged.block_scales(DOWN)[1, 1] = 0x00
    before = damaged.value(DOWN)
    receipt, after = mended(damaged)
    assert receipt.mended[0].effect is Effect.NONE
    assert np.array_equal(after.value(DOWN) & 0x7FFF, before & 0x7FFF)


def test_a_lost_scale_is_guessed_only_if_that_is_wanted(damaged: Damaged, mended: Mended, tmp_path: Path) -> None:
    row = damaged.block_scales(DOWN)[7].copy()
    damaged.block_scales(DOWN)[7, 0] = 0x7F
    receipt, after = mended(damaged)
    (mend,) = receipt.mended
    assert mend.effect is Effect.ESTIMATED
    assert "guess" in mend.action
    assert after.tensors[f"{DOWN}.weight_scale"].bits[7, 0] == np.sort(row[1:])[(len(row) - 2) // 2]
    strict = repair(tmp_path / "in", tmp_path / "strict", estimate=False)
    assert strict.outcome is RepairOutcome.NOT_MENDED
    assert [problem.subject for problem in strict.unmended] == [DOWN]
    assert "--source" in strict.unmended[0].needs
    assert not list(tmp_path.glob("strict*"))


def test_experts_that_calibration_missed_get_the_largest_input_scale(damaged: Damaged, mended: Mended) -> None:
    damaged.make_w4a4(0.5)
    name = INPUTS[damaged.dialect]
    # The largest as a factor, so the smallest where it divides.
    larger = 1.0
    other = "model.layers.0.mlp.experts.3.down_proj"
    damaged.tensors[other + name] = Tensor("F32", np.full(damaged.tensors[other + name].bits.shape, larger, "<f4"))
    damaged.drop(GATE + name, UP + name, DOWN + name)
    receipt, after = mended(damaged)
    assert receipt.activations == "W4A4"
    assert {mend.subject for mend in receipt.mended} == {GATE, UP, DOWN}
    assert after.tensors[DOWN + name].bits.reshape(-1)[0] == larger
    assert np.array_equal(after.tensors[GATE + name].bits, after.tensors[UP + name].bits)


def test_without_any_input_scale_it_becomes_w4a16(damaged: Damaged, mended: Mended) -> None:
    before = damaged.copy()
    damaged.make_w4a4()
    damaged.drop(*[module + INPUTS[damaged.dialect] for module in damaged.modules])
    receipt, after = mended(damaged)
    assert kinds(receipt) == {"config.activations": 1}
    assert receipt.activations == "W4A16"
    assert after.quantization == before.quantization


def test_an_attention_without_input_scale_makes_it_w4a16(damaged: Damaged, mended: Mended) -> None:
    before = damaged.copy()
    damaged.make_w4a4()
    damaged.drop("model.layers.0.self_attn.o_proj" + INPUTS[damaged.dialect])
    receipt, after = mended(damaged)
    assert receipt.activations == "W4A16"
    assert after.tensors.keys() == before.tensors.keys()


def test_input_scales_of_fused_linears_are_made_equal(damaged: Damaged, mended: Mended) -> None:
    damaged.make_w4a4(0.5)
    name = QUERY + INPUTS[damaged.dialect]
    damaged.tensors[name] = Tensor("F32", np.full(damaged.tensors[name].bits.shape, 0.25, dtype="<f4"))
    receipt, _ = mended(damaged)
    assert set(kinds(receipt)) == {"scales.input"}


def test_an_absurd_input_scale_counts_as_missing(damaged: Damaged, mended: Mended) -> None:
    damaged.make_w4a4(0.5)
    name = DOWN + INPUTS[damaged.dialect]
    damaged.tensors[name] = Tensor("F32", np.full(damaged.tensors[name].bits.shape, 1e-44, dtype="<f4"))
    receipt, _ = mended(damaged)
    assert [(mend.kind, mend.subject) for mend in receipt.mended] == [("scales.input", DOWN)]


def test_block_scales_of_another_type_keep_their_bytes(damaged: Damaged, mended: Mended) -> None:
    before = damaged.values()
    name = f"{DOWN}.weight_scale"
    damaged.tensors[name] = Tensor("U8", damaged.tensors[name].bits)
    receipt, after = mended(damaged)
    assert kinds(receipt) == {"linear.dtype": 1}
    assert after.tensors[name].dtype == "F8_E4M3"
    assert all(np.array_equal(value, before[module]) for module, value in after.values().items())


def test_a_cache_that_cannot_be_said_again(damaged: Damaged, tmp_path: Path) -> None:
    damaged.quantization.update(ignore=[], kv_cache_scheme={"num_bits": 4, "type": "int"})
    receipt = repair(damaged.write(tmp_path / "in"), tmp_path / "out")
    assert [entry.kind for entry in receipt.unmended] == ["config.cache"]


CONFIG_DAMAGE: dict[str, Callable[[Damaged], object]] = {
    "no ignore": lambda a: a.quantization.update(ignore=[]),
    "too much ignored": lambda a: a.quantization.update(ignore=["lm_head", "*.mlp.gate", "model.layers.0*", "re:.*"]),
    "nested": lambda a: a.config.update(text_config={"quantization_config": a.config.pop("quantization_config")}),
    "gone": lambda a: a.config.pop("quantization_config"),
    "no method": lambda a: a.quantization.pop("quant_method"),
    "other method": lambda a: a.quantization.update(quant_method="fp8"),
    "group of 32": lambda a: [
        a.quantization.update(group_size=32),
        a.quantization["config_groups"]["group_0"]["weights"].update(group_size=32),
    ],
    "eight bits": lambda a: a.quantization["config_groups"]["group_0"]["weights"].update(num_bits=8),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_config(damaged: Damaged, mended: Mended, damage: str) -> None:
    right = copy.deepcopy(damaged.quantization)
    CONFIG_DAMAGE[damage](damaged)
    receipt, after = mended(damaged)
    assert all(mend.kind.startswith("config.") for mend in receipt.mended)
    assert after.quantization == right
    assert "quantization_config" not in json.dumps(after.config.get("text_config", {}))


def test_a_config_only_in_the_legacy_file(moe_artifacts: dict[str, Path], mended: Mended, tmp_path: Path) -> None:
    artifact = Damaged(moe_artifacts["modelopt"])
    right = artifact.config.pop("quantization_config")
    legacy = {"quant_algo": "W4A16_NVFP4", "group_size": 16, "exclude_modules": right["ignore"]}
    artifact.files["hf_quant_config.json"] = json.dumps({"producer": {}, "quantization": legacy}).encode()
    receipt, after = mended(artifact)
    assert kinds(receipt) == {"config.place": 1}
    assert after.quantization == right
    assert "hf_quant_config.json" not in after.files


def test_a_legacy_file_that_contradicts(moe_artifacts: dict[str, Path], mended: Mended) -> None:
    artifact = Damaged(moe_artifacts["modelopt"])
    legacy = {"quant_algo": "FP8", "group_size": 16, "exclude_modules": artifact.quantization["ignore"]}
    artifact.files["hf_quant_config.json"] = json.dumps({"producer": {}, "quantization": legacy}).encode()
    receipt, after = mended(artifact)
    assert kinds(receipt) == {"config.legacy": 1}
    assert "hf_quant_config.json" not in after.files
    assert after.config == artifact.config


def test_leftovers_of_quantizers_go(damaged: Damaged, mended: Mended) -> None:
    damaged.tensors[f"{DOWN}.input_quantizer._amax"] = Tensor("F32", np.ones((), dtype="<f4"))
    damaged.tensors["lm_head.input_scale"] = Tensor("F32", np.ones((), dtype="<f4"))
    receipt, after = mended(damaged)
    assert kinds(receipt) == {"tensor.leftover": 2}
    assert not any("_amax" in name or name == "lm_head.input_scale" for name in after.tensors)


def test_what_engines_build_wide_is_stored_wide(moe_artifacts: dict[str, Path], moe: Path, tmp_path: Path) -> None:
    """An NVFP4 head, as tools make that quantize every linear: decoded, or taken from the original."""
    artifact = Damaged(moe_artifacts["modelopt"])
    like = "model.layers.0.self_attn.q_proj"
    rows, columns = artifact.tensors.pop("lm_head.weight").bits.shape
    codes = np.resize(artifact.codes(like), (rows, columns // 2))
    artifact.tensors["lm_head.weight"] = Tensor("U8", codes)
    artifact.tensors["lm_head.weight_scale"] = Tensor(
        "F8_E4M3", np.resize(artifact.block_scales(like), (rows, columns // 16))
    )
    artifact.tensors["lm_head.weight_scale_2"] = artifact.tensors[like + ".weight_scale_2"]
    artifact.quantization["ignore"] = [e for e in artifact.quantization["ignore"] if "lm_head" not in e]
    source = artifact.write(tmp_path / "in")
    receipt = repair(source, tmp_path / "out")
    assert kinds(receipt) == {"fp4.coverage": 1, "config.ignore": 1}
    assert verify(tmp_path / "out").verdict is Verdict.PASS
    out = Damaged(tmp_path / "out")
    assert out.tensors["lm_head.weight"].dtype == "BF16"
    assert np.array_equal(out.tensors["lm_head.weight"].bits, artifact.value("lm_head"))
    repair(source, tmp_path / "again", with_source=moe)
    assert verify(tmp_path / "again", against=moe).verdict is Verdict.PASS


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
class TestSpeech:
    """``disable_talker()`` leaves enable_audio_output as it was; the reverse happens too."""

    def test_no_talker(self, omni_artifacts: dict[str, Path], mended: Mended, dialect: str) -> None:
        artifact = Damaged(omni_artifacts[dialect])
        artifact.drop(*[name for name in artifact.tensors if name.startswith(("talker.", "code2wav."))])
        receipt, after = mended(artifact)
        assert "config.speech" in kinds(receipt)
        assert after.config["enable_audio_output"] is False

    def test_a_talker_that_the_config_denies(
        self, omni_artifacts: dict[str, Path], mended: Mended, dialect: str
    ) -> None:
        artifact = Damaged(omni_artifacts[dialect])
        artifact.config["enable_audio_output"] = False
        receipt, after = mended(artifact)
        assert kinds(receipt) == {"config.speech": 1}
        assert after.config["enable_audio_output"] is True

    def test_half_a_talker_that_the_config_denies(
        self, omni_artifacts: dict[str, Path], mended: Mended, dialect: str
    ) -> None:
        artifact = Damaged(omni_artifacts[dialect])
        artifact.config["enable_audio_output"] = False
        artifact.drop(*[name for name in artifact.tensors if name.startswith("code2wav.")])
        receipt, after = mended(artifact)
        assert "config.speech" in kinds(receipt)
        assert not any(name.startswith("talker.") for name in after.tensors)

    def test_with_the_original_it_comes_back(
        self, omni_artifacts: dict[str, Path], tiny_omni: Path, tmp_path: Path, dialect: str
    ) -> None:
        artifact = Damaged(omni_artifacts[dialect])
        artifact.drop(*[name for name in artifact.tensors if name.startswith(("talker.", "code2wav."))])
        repair(artifact.write(tmp_path / "in"), tmp_path / "out", with_source=tiny_omni)
        assert verify(tmp_path / "out", against=tiny_omni).verdict is Verdict.PASS
        assert any(name.startswith("talker.") for name in Damaged(tmp_path / "out").tensors)


def test_the_record_is_kept(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    artifact = Damaged(moe_artifacts["modelopt"], receipt=True)
    artifact.block_scales(DOWN)[7, 0] = 0x7F
    receipt = repair(artifact.write(tmp_path / "in"), tmp_path / "out")
    kept = read_json(tmp_path / "out" / "omnifp4.json")
    assert kept["recipe"] == "nvfp4"
    assert kept["changes"][0]["receipt"] == "repair"
    assert kept["changes"][0]["mended"][0]["subject"] == DOWN
    assert kept["tensors"] == receipt.tensors
    assert f"{DOWN}.weight" not in kept["decisions"], "its error is not known any more"
    assert "## Repaired" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out").verdict is Verdict.PASS


def test_checksums_prove_which_scale_was_right(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    for dialect in ("modelopt", "compressed-tensors"):
        whole = moe_artifacts[dialect]
        artifact = Damaged(whole, receipt=True)
        artifact.set_tensor_scale(GATE, float(artifact.tensor_scale(GATE)) * 1.3)
        artifact.codes(DOWN)[...] = (artifact.codes(DOWN) >> 4) | (artifact.codes(DOWN) << 4)
        receipt = repair(artifact.write(tmp_path / "in"), tmp_path / dialect)
        assert kinds(receipt) == {"scales.shared": 1, "codes.swapped": 1}
        assert {mend.effect for mend in receipt.mended} == {Effect.RESTORED}
        right = Damaged(whole).tensors
        assert all(tensor.same_as(right[name]) for name, tensor in Damaged(tmp_path / dialect).tensors.items())
        assert verify(tmp_path / dialect).verdict is Verdict.PASS
