"""Proof of artifacts with FP8, MXFP4 and INT8 linears: right ones pass, and each damage fails the check that is for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from verify_artifacts import Artifact, load_folder

from omnifp4.receipt.base import Verdict
from omnifp4.receipt.verification import Check, VerificationReceipt
from omnifp4.verification import verify
from omnifp4.verification.values import SourceNames
from small_checkpoints import MIXED_COMPONENTS

Judge = Callable[..., VerificationReceipt]
BOTH = pytest.mark.parametrize("dialect", MIXED_COMPONENTS)
Q = "thinker.model.layers.0.self_attn.q_proj"
EXPERT = "talker.model.layers.0.mlp.experts.1.up_proj"


@pytest.fixture(scope="session")
def loaded(mixed_artifacts: dict[str, Path]) -> dict[str, Artifact]:
    return {name: load_folder(folder) for name, folder in mixed_artifacts.items()}


@pytest.fixture(scope="session")
def plain(loaded: dict[str, Artifact]) -> dict[str, Artifact]:
    """With a receipt that tells only what was asked: values are judged, checksums and exact codes cannot be."""
    bare = {name: artifact.copy() for name, artifact in loaded.items()}
    for artifact in bare.values():
        receipt = json.loads(artifact.side["omnifp4.json"])
        artifact.side["omnifp4.json"] = json.dumps({"components": receipt["components"]}).encode()
    return bare


def failing(receipt: VerificationReceipt) -> dict[str, Check]:
    return {check.name: check for check in receipt.checks if check.verdict is Verdict.FAIL}


@BOTH
def test_a_right_artifact_passes(mixed_artifacts: dict[str, Path], tiny_omni: Path, dialect: str) -> None:
    receipt = verify(mixed_artifacts[dialect], against=tiny_omni)
    assert not failing(receipt)
    unchecked = {check.name for check in receipt.checks if check.verdict is Verdict.NOT_CHECKED}
    # In the second one no two NVFP4 linears are fused.
    assert unchecked <= {"scales.shared"}
    checks = {check.name: check for check in receipt.checks}
    assert "every scale and code as the reference derives it" in checks["values.coded"].summary
    stated = json.loads((mixed_artifacts[dialect] / "omnifp4.json").read_text())
    assert receipt.schemes.keys() == {"nvfp4", *(stated["schemes"].values())}
    assert sum(receipt.schemes.values()) == len(stated["decisions"])
    assert receipt.relative_squared_error == pytest.approx(stated["relative_squared_error"], rel=1e-3)
    assert receipt.dialect == dialect


@BOTH
def test_a_fake_twin_passes(mixed_artifacts: dict[str, Path], tiny_omni: Path, dialect: str) -> None:
    receipt = verify(mixed_artifacts[f"{dialect}-fake"], against=tiny_omni)
    assert not failing(receipt)
    checks = {check.name: check for check in receipt.checks}
    assert "FP8" in checks["fp4.fake"].summary
    assert "MXFP4" in checks["fp4.fake"].summary


@BOTH
def test_a_fake_twin_with_weights_that_were_not_rounded(
    loaded: dict[str, Artifact], tiny_omni: Path, tmp_path: Path, dialect: str
) -> None:
    artifact, source = loaded[f"{dialect}-fake"].copy(), load_folder(tiny_omni)
    schemes = json.loads(artifact.side["omnifp4.json"])["schemes"]
    chosen = {scheme: name for name, scheme in schemes.items() if name in artifact.tensors}
    assert len(chosen) > 1
    for name in chosen.values():
        artifact.tensors[name] = source.tensors[name]
    findings = "\n".join(failing(verify(artifact.write(tmp_path / "fake")))["fp4.fake"].findings)
    for scheme, name in chosen.items():
        assert f"{name}: its values are not those of {scheme}" in findings


def change(artifact: Artifact, name: str, edit: Callable[[np.ndarray], None], dtype: str = "u1") -> None:
    values = np.frombuffer(artifact.tensors[name][2], dtype).copy()
    edit(values)
    artifact.put(name, values)


def set_first(value: float) -> Callable[[np.ndarray], None]:
    def edit(values: np.ndarray) -> None:
        values[0] = value

    return edit


@pytest.mark.parametrize(
    ("dialect", "name", "edit", "dtype", "checks"),
    [
        ("modelopt", f"{Q}.weight_scale", set_first(np.nan), "<f4", {"scales.coded", "values.coded"}),
        ("modelopt", f"{Q}.weight_scale", set_first(-1), "<f4", {"scales.coded", "values.coded"}),
        ("modelopt", f"{Q}.weight_scale", set_first(1e6), "<f4", {"scales.coded", "values.coded"}),
        ("modelopt", f"{Q}.weight", set_first(0x7F), "u1", {"scales.coded", "values.coded"}),
        ("modelopt", f"{EXPERT}.weight_scale", set_first(0), "<f4", {"scales.coded"}),
        ("modelopt", "talker.model.layers.0.self_attn.k_proj.weight_scale", set_first(255), "u1", {"scales.coded", "values.coded"}),
        ("compressed-tensors", f"{Q}.weight_scale", set_first(0x7FC0), "<u2", {"scales.coded", "values.coded"}),
        ("compressed-tensors", f"{Q}.weight_shape", set_first(7), "<i8", {"scales.coded"}),
        ("compressed-tensors", "thinker.model.layers.0.mlp.experts.0.up_proj.weight_scale", set_first(200), "u1", {"values.coded"}),
    ],
)  # fmt: skip
def test_damaged_scales_and_codes(
    plain: dict[str, Artifact], tiny_omni: Path, tmp_path: Path,
    dialect: str, name: str, edit: Callable[[np.ndarray], None], dtype: str, checks: set[str],
) -> None:  # fmt: skip
    artifact = plain[dialect].copy()
    change(artifact, name, edit, dtype)
    failed = failing(verify(artifact.write(tmp_path / "damaged"), against=tiny_omni))
    assert checks <= failed.keys()
    assert failed.keys() <= {"scales.coded", "values.coded"}
    module = name.rpartition(".")[0]
    assert all(module in "\n".join(failed[check].findings) for check in checks)


def test_one_changed_code_of_our_own_is_seen(loaded: dict[str, Artifact], tiny_omni: Path, tmp_path: Path) -> None:
    artifact = loaded["compressed-tensors"].copy()
    change(artifact, f"{Q}.weight_packed", lambda codes: codes.__setitem__(5, codes[5] ^ 1))
    failed = failing(verify(artifact.write(tmp_path / "damaged"), against=tiny_omni))
    assert {"shards.checksums", "values.coded"} <= failed.keys()
    assert "0 scales and 1 codes are not what the reference derives" in failed["values.coded"].findings[0]


def test_values_of_another_linear(plain: dict[str, Artifact], tiny_omni: Path, tmp_path: Path) -> None:
    artifact = plain["modelopt"].copy()
    other = Q.replace("layers.0", "layers.1")
    for ending in (".weight", ".weight_scale"):
        artifact.tensors[Q + ending] = artifact.tensors[other + ending]
    failed = failing(verify(artifact.write(tmp_path / "swapped"), against=tiny_omni))
    assert failed.keys() == {"values.coded"}
    assert Q in failed["values.coded"].findings[0]


@pytest.mark.parametrize(
    ("dialect", "name", "told"),
    [
        ("modelopt", f"{Q}.weight_scale", "its scale is missing"),
        ("compressed-tensors", f"{Q}.weight_scale", "its scale is missing"),
        ("modelopt", f"{Q}.weight", "missing"),
    ],
)
def test_a_part_that_is_missing(plain: dict[str, Artifact], tmp_path: Path, dialect: str, name: str, told: str) -> None:
    artifact = plain[dialect].copy()
    del artifact.tensors[name]
    failed = failing(verify(artifact.write(tmp_path / "lacking")))
    assert told in "\n".join(failed["tensors.complete"].findings)


def test_codes_of_the_wrong_shape(plain: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = plain["modelopt"].copy()
    dtype, shape, data = artifact.tensors[f"{Q}.weight"]
    artifact.tensors[f"{Q}.weight"] = (dtype, shape[::-1], data)
    findings = failing(verify(artifact.write(tmp_path / "turned")))["tensors.complete"].findings
    assert any(Q in finding for finding in findings)


def edit_config(artifact: Artifact, edit: Callable[[dict[str, Any]], None]) -> Artifact:
    changed = artifact.copy()
    changed.config = json.loads(json.dumps(changed.config))
    edit(changed.config["quantization_config"])
    return changed


def test_a_layer_under_the_wrong_algorithm(plain: dict[str, Artifact], tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["quantized_layers"][Q]["quant_algo"] = "W4A16_NVFP4"

    failed = failing(verify(edit_config(plain["modelopt"], edit).write(tmp_path / "a")))
    assert failed["config.schemes"].findings == (f"{Q}: the config says FP4, its tensors are FP8",)


def test_a_layer_that_is_not_named(plain: dict[str, Artifact], tmp_path: Path) -> None:
    failed = failing(
        verify(edit_config(plain["modelopt"], lambda config: config["quantized_layers"].pop(Q)).write(tmp_path / "a"))
    )
    assert failed["ignore"].findings == (f"{Q}: FP8, but the config says it is not quantized",)


def test_a_layer_in_the_wrong_group(plain: dict[str, Artifact], tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        groups = config["config_groups"].values()
        wrong = next(group for group in groups if group["format"] == "mxfp4-pack-quantized")
        wrong["targets"].insert(0, f"re:{re.escape(Q)}$")
        config["config_groups"] = dict(sorted(config["config_groups"].items(), key=lambda item: item[1] is not wrong))

    failed = failing(verify(edit_config(plain["compressed-tensors"], edit).write(tmp_path / "a")))
    assert failed["config.schemes"].findings == (f"{Q}: the config says MXFP4, its tensors are INT8",)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda groups: groups["int8"].update(format="nvfp4-pack-quantized"), "is not that of int8"),
        (lambda groups: groups["mxfp4"]["weights"].update(strategy="channel"), "mxfp4 has group"),
        (lambda groups: groups["fp8"]["weights"].update(symmetric=False), "not symmetric"),
    ],
)
def test_a_group_that_contradicts_itself(
    plain: dict[str, Artifact], tmp_path: Path, edit: Callable[[Any], None], told: str
) -> None:
    names = {"pack-quantized": "int8", "mxfp4-pack-quantized": "mxfp4", "float-quantized": "fp8"}

    def apply(config: dict[str, Any]) -> None:
        edit({names[g["format"]]: g for g in config["config_groups"].values() if g["format"] in names})

    failed = failing(verify(edit_config(plain["compressed-tensors"], apply).write(tmp_path / "a")))
    assert told in "\n".join(failed["config.scheme"].findings)


def test_a_format_that_names_one_scheme_only(plain: dict[str, Artifact], tmp_path: Path) -> None:
    wrong = edit_config(plain["compressed-tensors"], lambda config: config.update(format="nvfp4-pack-quantized"))
    findings = "\n".join(failing(verify(wrong.write(tmp_path / "a")))["config.scheme"].findings)
    assert "mixed-precision with a group of mxfp4-pack-quantized" in findings


def test_fused_linears_of_two_schemes(plain: dict[str, Artifact], loaded: dict[str, Artifact], tmp_path: Path) -> None:
    """q in FP8 and k, v wide: engines build them as one."""
    artifact, source = plain["modelopt"].copy(), loaded["modelopt-fake"]
    for part in ("k", "v"):
        module = Q.replace("q_proj", f"{part}_proj")
        artifact.tensors[f"{module}.weight"] = source.tensors[f"{module}.weight"]
        del artifact.tensors[f"{module}.weight_scale"]
        artifact.config["quantization_config"]["quantized_layers"].pop(module)
    failed = failing(verify(artifact.write(tmp_path / "a")))
    assert "is FP8" in "\n".join(failed["ignore.engines"].findings)


def test_what_engines_do_not_read_is_a_note(mixed_artifacts: dict[str, Path]) -> None:
    checks = {check.name: check for check in verify(mixed_artifacts["modelopt"]).checks}
    assert "reads none of these from modelopt: MXFP4 qkv_proj" in checks["ignore.engines"].summary
    assert "FP8 experts" in checks["ignore.engines"].summary
    others = {check.name: check for check in verify(mixed_artifacts["compressed-tensors"]).checks}
    assert "reads none" not in others["ignore.engines"].summary


@BOTH
def test_what_has_no_original_is_not_called_checked(
    mixed_artifacts: dict[str, Path], tiny_omni: Path, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One linear that cannot be joined leaves the others compared, and the check undecided."""
    find = SourceNames.find
    seen: list[str] = []

    def without_the_first(self: SourceNames, name: str) -> Any:
        seen.append(name)
        return None if name == seen[0] else find(self, name)

    monkeypatch.setattr(
        "omnifp4.verification.coded.SourceNames", type("Lacking", (SourceNames,), {"find": without_the_first})
    )
    check = {check.name: check for check in verify(mixed_artifacts[dialect], against=tiny_omni).checks}["values.coded"]
    assert check.verdict is Verdict.NOT_CHECKED
    assert "1 FP8, MXFP4 and INT8 linears could not be joined" in check.model_dump_json()
