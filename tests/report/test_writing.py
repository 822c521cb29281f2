"""Files that are written, replaced, or left alone; the model card; the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import report_receipts

import omnifp4
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.base import Verdict
from omnifp4.report.markdown import escaped
from omnifp4.report.model_card import MEASURED_BEGIN, MEASURED_END


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def test_records_in_memory_and_files_make_one_report(receipts: dict[str, Path], tmp_path: Path) -> None:
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    found = omnifp4.write_report([receipts["plan"], report_receipts.evaluation()], [page, data])
    assert [file.receipt for file in found.files] == ["plan", "evaluation"]
    assert json.loads(data.read_text())["receipt"] == "report"
    assert page.read_text().startswith("<!DOCTYPE html>")
    omnifp4.write_report([data], [page, data])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_pictures_stand_alone(receipts: dict[str, Path], tmp_path: Path) -> None:
    omnifp4.write_report(receipts.values(), pictures=tmp_path / "new" / "pictures")
    found = {path.name: ElementTree.parse(path).getroot() for path in (tmp_path / "new" / "pictures").iterdir()}
    assert set(found) == {
        "size.svg", "quality.svg", "quality-2.svg", "sensitivity.svg", "sensitivity-2.svg", "sensitivity-3.svg", "sensitivity-4.svg",
        "weights.svg", "calibration.svg", "speed.svg",
    }  # fmt: skip
    for picture in found.values():
        assert picture.attrib["viewBox"].startswith("-16 -46 852 ")
        assert next(picture.iter("{http://www.w3.org/2000/svg}text")).attrib["class"] == "headline"
        assert "prefers-color-scheme: dark" in (picture.findtext("{http://www.w3.org/2000/svg}style") or "")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("report.pdf", None, r"ends with '\.pdf'; a report is \.html or \.json"),
        ("report", None, "ends with 'nothing'"),
        ("gone/report.html", None, "there is no folder"),
        ("mine.html", "<p>mine</p>", "is no report of omnifp4"),
        ("plan.json", '{"receipt": "plan"}', "is no report of omnifp4"),
    ],
)
def test_other_files_are_left_alone(
    receipts: dict[str, Path], tmp_path: Path, name: str, content: str | None, told: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(OmniFP4Error, match=told):
        omnifp4.write_report([receipts["plan"]], path)
    assert (path.read_text() if path.exists() else None) == content


def test_a_card_tells_what_was_measured(artifact: Path, receipts: dict[str, Path]) -> None:
    card = artifact / "README.md"
    before = card.read_text()
    assert "What it costs in answers was not measured here." in before
    omnifp4.write_report([receipts["verification"], receipts["evaluation"]], card=artifact)
    text = card.read_text()
    assert "What it costs in answers was not measured here." not in text
    outside = before.partition(MEASURED_BEGIN)[0], before.partition(MEASURED_END)[2]
    assert (text.partition(MEASURED_BEGIN)[0], text.partition(MEASURED_END)[2]) == outside
    for told in (
        "## Proof",
        "19 pass",
        "## What it costs in answers",
        "0.0310 (0.0279",
        "| audio |",
        "## Not measured",
    ):
        assert told in text, told
    assert "/home/somebody" not in text
    # It is still the artifact that it was.
    assert omnifp4.verify(artifact, threads=2).verdict is not Verdict.FAIL
    card.write_text(text.replace("# tiny-omni in NVFP4", "# My own words"))
    omnifp4.write_report([receipts["verification"]], card=artifact)
    assert "# My own words" in card.read_text()
    assert "0.0310" not in card.read_text()


def test_a_card_of_other_hands_is_left_alone_and_a_missing_one_is_made(
    artifact: Path, receipts: dict[str, Path]
) -> None:
    card = artifact / "README.md"
    card.write_text("# mine\n")
    with pytest.raises(OmniFP4Error, match=r"lacks the marks .* \(move README\.md away"):
        omnifp4.write_report([receipts["verification"]], card=artifact)
    assert card.read_text() == "# mine\n"
    card.unlink()
    omnifp4.write_report([receipts["verification"]], card=artifact)
    assert "## Proof" in card.read_text()
    assert "library_name: transformers" in card.read_text()


def test_a_card_needs_the_artifact_s_own_receipt(receipts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OmniFP4Error, match=r"omnifp4\.json: cannot be read"):
        omnifp4.write_report([receipts["plan"]], card=tmp_path)


def test_markdown_shows_text_as_it_is() -> None:
    assert escaped("a|b <i> `c` *d* code_predictor _e_ \\ [x](y)\n# z") == (
        r"a\|b \<i\> \`c\` \*d\* code_predictor \_e\_ \\ \[x\](y) \# z"
    )


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "omnifp4", "report", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_command_shows_and_writes(receipts: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = command(*receipts.values(), "-o", page, "-o", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    for told in ("tiny-omni in NVFP4", "19 pass", "96.20", "Where FP4 hurts:", "decode, batch 1"):
        assert told in done.stdout, told
    assert f"wrote {page}" in done.stderr
    assert page.exists()
    done = command(receipts["plan"], "--json")
    assert json.loads(done.stdout)["plan"]["receipt"] == "plan"
    done = command(receipts["plan"])
    assert "Proof: not measured; omnifp4 verify OUT" in done.stdout


def test_the_command_refuses_in_one_line(receipts: dict[str, Path], tmp_path: Path) -> None:
    for arguments in ((), (tmp_path / "gone.json",), (receipts["plan"], "-o", tmp_path / "x.txt")):
        done = command(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
