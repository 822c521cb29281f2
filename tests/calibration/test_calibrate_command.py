"""The verbs as a person runs them: what they print, and their exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")


@pytest.fixture
def omnifp4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process; exit status, stdout, stderr."""
    from omnifp4.cli.main import run

    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omnifp4", *map(str, arguments)])
        status = 0
        try:
            run()
        except SystemExit as end:
            status = int(end.code or 0)
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call


def test_from_set_to_statistics(omnifp4: Callable[..., tuple[int, str, str]], tiny_omni: Path, tmp_path: Path) -> None:
    status, shown, told = omnifp4("dataset", tmp_path / "set", "--samples", 8, "--model", tiny_omni)
    assert status == 0
    assert "image tokens" in shown
    assert "counted by the processor of tiny-omni" in shown
    assert f"next: omnifp4 calibrate {tiny_omni} STATISTICS --data {tmp_path}/set" in told
    status, shown, told = omnifp4(
        "calibrate", tiny_omni, tmp_path / "statistics", "--data", tmp_path / "set", "--no-speech",
        "--least-tokens", 100_000, "--receipt", tmp_path / "receipt.json",
    )  # fmt: skip
    assert status == 0
    assert "8 of 8 samples of set" in shown
    assert "thinker.model.layers.3" in shown
    assert (
        "experts below 100,000 routed tokens: 32 of 32; 0 take the all-expert statistics, 32 the data-free rule"
        in shown
    )
    assert "code_predictor: --no-speech was given" in " ".join(shown.split())
    (next_command,) = (line.removeprefix("next: omnifp4 ") for line in told.splitlines() if line.startswith("next: "))
    status, _, told = omnifp4(*next_command.replace(" OUT ", f" {tmp_path / 'out'} ").split())
    assert status == 0, told
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["receipt"] == "calibration"
    assert receipt["data"] == "set"
    assert len(receipt["experts"]) == 4
    assert str(tmp_path) not in (tmp_path / "receipt.json").read_text()


def test_a_receipt_cannot_replace_the_statistics(
    omnifp4: Callable[..., tuple[int, str, str]], tiny_omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("omnifp4.api.calibrate", lambda *_, **__: pytest.fail("it was run"))
    status, shown, told = omnifp4("calibrate", tiny_omni, tmp_path / "statistics", "--receipt", "statistics")
    assert (status, shown) == (2, "")
    assert told == "error: --receipt is statistics, the statistics' own file (choose another name)\n"
    assert not list(tmp_path.iterdir())


def test_json(omnifp4: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, shown, _ = omnifp4("dataset", tmp_path / "set", "--samples", 4, "--modality", "text", "--json")
    assert status == 0
    assert json.loads(shown)["conversations"] == 4


def test_exit_status_1_when_all_fail(
    omnifp4: Callable[..., tuple[int, str, str]], tiny_omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinker = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
    monkeypatch.setattr(thinker, "forward", torch.nn.modules.module._forward_unimplemented)
    status, shown, told = omnifp4(
        "calibrate", tiny_omni, tmp_path / "statistics", "--samples", 6, "--max-failed", 1, "--no-speech"
    )
    assert status == 1
    assert shown == ""
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith(
        "error: 6 of 6 samples failed (wrong forward: 6), and at most 100% may; nothing whole is written"
    )
    assert not (tmp_path / "statistics").exists()


def test_exit_status_2_for_wrong_use(
    omnifp4: Callable[..., tuple[int, str, str]], tiny_omni: Path, tmp_path: Path
) -> None:
    for arguments, told in (
        (("calibrate", tiny_omni, tmp_path / "out", "--data", tmp_path / "none"), "cannot be read as JSONL"),
        (("calibrate", tmp_path / "none", tmp_path / "out"), "none"),
        (("calibrate", tiny_omni, tmp_path / "out", "--receipt", tmp_path / "no" / "r.json"), "is no folder"),
        (("dataset", tmp_path), "exists already"),
    ):
        status, shown, error = omnifp4(*arguments)
        assert status == 2
        assert shown == ""
        assert told in error
        assert error.startswith("error: ")
    assert not (tmp_path / "out").exists()
