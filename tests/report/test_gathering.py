"""Receipts from files: what is read, what is refused, and by which words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_receipts

import omnifp4
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.gathering import gather
from omnifp4.report.reading import ReceiptError


def changed(path: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a receipt with something in it changed."""
    value = json.loads(path.read_text())
    change(value)
    copy = tmp_path / path.name
    copy.write_text(json.dumps(value))
    return copy


def test_all_kinds_come_together(receipts: dict[str, Path]) -> None:
    found = gather(receipts.values())
    assert found.model == "tiny-omni"
    assert found.model_type == "qwen3_omni_moe"
    assert found.plan and found.quantization and found.verification and found.sensitivity and found.doctor
    assert len(found.evaluations) == len(found.benches) == 1
    assert next(file.receipt for file in found.files) == "quantization"
    assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) for file in found.files)
    assert found.notes == ()


def test_a_gathered_receipt_is_one_again(receipts: dict[str, Path], tmp_path: Path) -> None:
    first = omnifp4.write_report(receipts.values(), tmp_path / "all.json")
    again = gather([tmp_path / "all.json"])
    assert again.model_copy(update={"environment": first.environment}) == first
    # The same receipt twice is one receipt.
    assert gather([tmp_path / "all.json", receipts["plan"]]).files == first.files
    assert GatheredReceipt.model_validate_json((tmp_path / "all.json").read_text(), strict=True) == first


def test_nothing_given() -> None:
    with pytest.raises(OmniFP4Error, match="no receipt was given"):
        gather([])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda r: r.update(version=2),
            "field version: is 2; this omnifp4 reads version 1 of the verification receipt",
        ),
        (lambda r: r.pop("version"), "field version: is 'missing'"),
        (lambda r: r.update(version="1"), "field version: is '1'"),
        (lambda r: r["checks"][3].update(verdict="maybe"), "field checks.3.verdict: .* not 'maybe'"),
        (lambda r: r.update(surprise=1), "field surprise: Extra inputs"),
        (lambda r: r.pop("dialect"), "field dialect: Field required"),
        (lambda r: r.update(weight_bytes="8"), "field weight_bytes: .* not '8'"),
        (lambda r: r.update(weight_bytes=10**400), "field weight_bytes: is no number that fits 64 bits"),
        (lambda r: r.update(receipt="invoice"), "receipt is 'invoice'; read are plan, calibration, quantization"),
        (lambda r: r.pop("receipt"), "has no field receipt"),
    ],
)
def test_file_and_field_are_named(
    receipts: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    path = changed(receipts["verification"], tmp_path, change)
    with pytest.raises(ReceiptError, match=re.escape(str(path)) + ": " + told):
        gather([path])


def test_versions_inside_a_gathered_one_count(receipts: dict[str, Path], tmp_path: Path) -> None:
    omnifp4.write_report(receipts.values(), tmp_path / "all.json")
    for change, told in (
        (lambda r: r["evaluations"][0].update(version=7), "field evaluations.0.version: is 7"),
        (lambda r: r["plan"].update(version=0), "field plan.version: is 0"),
        (
            lambda r: r["comparison"]["evaluations"][1].update(version=7),
            r"field comparison\.evaluations\.1\.version: is 7",
        ),
        (lambda r: r["files"].pop(), "field files: does not name what"),
    ):
        (tmp_path / "changed").mkdir(exist_ok=True)
        path = changed(tmp_path / "all.json", tmp_path / "changed", change)  # type: ignore[arg-type]
        with pytest.raises(ReceiptError, match=told):
            gather([path])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'"text"', b'{"receipt": ["plan"]}']
)
def test_what_is_no_receipt(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ReceiptError, match=re.escape(str(path))) as error:
        gather([path])
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_without_a_receipt(tmp_path: Path) -> None:
    with pytest.raises(ReceiptError, match=r"gone\.json: cannot be read: No such file"):
        gather([tmp_path / "gone.json"])
    with pytest.raises(ReceiptError, match=r"omnifp4\.json: cannot be read: No such file"):
        gather([tmp_path])


def test_a_weight_file_is_not_read_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnifp4.report.reading.LARGEST_BYTES", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(11))
    with pytest.raises(ReceiptError, match="has 11 bytes; a receipt has at most 10"):
        gather([path])


def test_two_that_do_not_belong_together(receipts: dict[str, Path], tmp_path: Path) -> None:
    other = changed(receipts["plan"], tmp_path, lambda r: r.update(model_type="llama"))
    with pytest.raises(ReceiptError, match=r"is of a qwen3_omni_moe, and plan\.json of a llama"):
        gather([other, receipts["verification"]])
    second = changed(receipts["plan"], tmp_path, lambda r: r.update(model="another"))
    with pytest.raises(ReceiptError, match=r"a second plan receipt beside plan\.json"):
        gather([receipts["plan"], second])


def test_sizes_that_differ_are_told(receipts: dict[str, Path], tmp_path: Path) -> None:
    plan = changed(receipts["plan"], tmp_path, lambda r: r.update(weight_bytes_after=5))
    (note,) = gather([plan, receipts["quantization"]]).notes
    assert note.startswith("the plan tells 5 bytes of weights and quantize wrote 8,1")


def test_the_map_is_of_what_the_artifact_was_made_from() -> None:
    assert omnifp4.write_report([report_receipts.sensitivity()]).model == "tiny-omni"


def test_different_samples_are_told() -> None:
    one, other = (report_receipts.evaluation(f"/x/{name}") for name in ("one", "other"))
    assert omnifp4.write_report([one, other]).notes == ()
    other = other.model_copy(update={"data_sha256": "cd" * 32})
    (note,) = omnifp4.write_report([one, other]).notes
    assert note == "one and other were evaluated on different samples: their figures cannot be compared"


def test_several_evaluations_keep_their_order(tmp_path: Path) -> None:
    paths = []
    for name in ("b-max", "a-sweep"):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(report_receipts.evaluation(f"/x/{name}").model_dump_json())
    found = gather(paths)
    assert [item.model for item in found.evaluations] == ["/x/b-max", "/x/a-sweep"]
    # Without receipts that know the source by name, its folder's name is taken, and never its path.
    assert found.model == "tiny-omni"
