"""Shards and index: what the index says is only one opinion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from damaging import Damaged, read_json

from omnifp4.conversion import repair
from omnifp4.errors import CheckpointError, OutputError
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.repair import RepairOutcome
from omnifp4.verification import verify
from small_checkpoints import Tensor, file_bytes

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(damaged: Damaged, tmp_path: Path) -> Path:
    """A right artifact in three shards."""
    return damaged.write(tmp_path / "in", shards=3)


def mend(folder: Path, damaged: Damaged, kind: str) -> None:
    """Repair it: only damage of one kind, and all tensors as they were."""
    receipt = repair(folder, folder.with_name("out"), threads=1)
    assert receipt.outcome is RepairOutcome.MENDED, receipt.unmended
    assert {entry.kind for entry in receipt.mended} == {kind}
    assert verify(folder.with_name("out")).verdict is Verdict.PASS
    after = Damaged(folder.with_name("out")).tensors
    assert after.keys() == damaged.tensors.keys()
    assert all(tensor.same_as(damaged.tensors[name]) for name, tensor in after.items())


@pytest.mark.parametrize("content", [None, "{", '{"weight_map": {}}', '{"weight_map": {"x": "../../etc/passwd"}}'])
def test_an_unusable_index(folder: Path, damaged: Damaged, content: str | None) -> None:
    if content is None:
        (folder / INDEX).unlink()
    else:
        (folder / INDEX).write_text(content)
    mend(folder, damaged, "index")


def test_a_wrong_index(folder: Path, damaged: Damaged) -> None:
    index = read_json(folder / INDEX)
    names = list(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[1]]
    del index["weight_map"][names[2]]
    index["weight_map"]["ghost.weight"] = index["weight_map"][names[3]]
    (folder / INDEX).write_text(json.dumps(index))
    mend(folder, damaged, "index")


def test_a_wrong_total(folder: Path, damaged: Damaged) -> None:
    index = read_json(folder / INDEX)
    index["metadata"]["total_size"] += 7
    (folder / INDEX).write_text(json.dumps(index))
    mend(folder, damaged, "index")


def test_a_stray_shard(folder: Path, damaged: Damaged) -> None:
    other = {name: Tensor(t.dtype, np.zeros_like(t.bits)) for name, t in damaged.tensors.items()}
    (folder / "model.safetensors").write_bytes(file_bytes(other))
    mend(folder, damaged, "shard.stray")


def test_duplicates(folder: Path, damaged: Damaged) -> None:
    (folder / INDEX).unlink()
    name = "model.norm.weight"
    (folder / "extra.safetensors").write_bytes(file_bytes({name: damaged.tensors[name]}))
    receipt = repair(folder, folder.with_name("out"))
    assert {entry.kind for entry in receipt.mended} == {"index", "tensor.duplicate"}
    assert verify(folder.with_name("out")).verdict is Verdict.PASS
    shutil.rmtree(folder.with_name("out"))
    changed = Tensor(damaged.tensors[name].dtype, np.zeros_like(damaged.tensors[name].bits))
    (folder / "extra.safetensors").write_bytes(file_bytes({name: changed}))
    receipt = repair(folder, folder.with_name("out"))
    assert [(entry.kind, entry.subject) for entry in receipt.unmended] == [("tensor.duplicate", name)]
    assert not folder.with_name("out").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_a_lost_shard_needs_the_original(folder: Path, damaged: Damaged, moe: Path, damage: str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        data = shard.read_bytes()
        shard.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"garbage" * 100)
    out = folder.with_name("out")
    receipt = repair(folder, out)
    assert receipt.outcome is RepairOutcome.NOT_MENDED
    assert any(entry.kind in ("shard.unreadable", "tensor.missing") for entry in receipt.unmended)
    assert not list(folder.parent.glob("out*"))
    receipt = repair(folder, out, with_source=moe)
    assert receipt.outcome is RepairOutcome.MENDED, receipt.unmended
    proof = verify(out, against=moe)
    assert proof.verdict is Verdict.PASS, [check.findings for check in proof.checks]
    assert Damaged(out).tensors.keys() == damaged.tensors.keys()


def test_an_unreadable_shard_that_nothing_needs(folder: Path, damaged: Damaged) -> None:
    (folder / "backup.safetensors").write_bytes(b"torn")
    mend(folder, damaged, "shard.unreadable")


def test_an_unreadable_receipt_is_replaced(damaged: Damaged, tmp_path: Path) -> None:
    damaged.files["omnifp4.json"] = b"{"
    receipt = repair(damaged.write(tmp_path / "in"), tmp_path / "out")
    assert {entry.kind for entry in receipt.mended} == {"receipt"}
    assert read_json(tmp_path / "out" / "omnifp4.json")["receipt"] == "repair"


def test_a_receipt_of_other_files_is_brought_up_to_date(moe_artifacts: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(moe_artifacts["modelopt"], tmp_path / "in")
    record = read_json(source / "omnifp4.json")
    record["shards"] = {"model-00001-of-00002.safetensors": 7}
    del record["tensors"]["lm_head.weight"]
    (source / "omnifp4.json").write_text(json.dumps(record))
    assert verify(source).verdict is Verdict.FAIL
    receipt = repair(source, tmp_path / "out")
    assert {entry.kind for entry in receipt.mended} == {"receipt"}
    assert verify(tmp_path / "out").verdict is Verdict.PASS


def test_what_is_no_artifact_folder(tmp_path: Path, damaged: Damaged) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        repair(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        repair(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        repair(tmp_path / "empty", tmp_path / "out")
    source = damaged.write(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        repair(source, tmp_path / "out")
