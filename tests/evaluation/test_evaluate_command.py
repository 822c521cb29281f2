"""The command: exit statuses, what is printed where, and options that would be ignored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from omnifp4.cli import main
from omnifp4.receipt.evaluation import EvaluationReceipt

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``omnifp4 evaluate …`` in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omnifp4", "evaluate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main.run()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


def test_limits_decide_the_exit_status(
    command: Any, tiny_omni: Path, tiny_artifact: Path, few: Path, cache: Path, receipt: Any, tmp_path: Path
) -> None:
    pair = (tiny_artifact, "--against", tiny_omni, "--data", few, "--cache", cache, "--no-speech")
    worst = max(one.model.kl_mean.value for one in receipt.modalities)
    status, shown, _ = command(*pair, "--max-kl", 2 * worst, "--receipt", tmp_path / "receipt.json")
    assert status == 0
    assert "PASS" in shown
    tables = [line for line in shown.splitlines() if line.startswith(" ")]
    assert len(tables) > 10
    assert max(map(len, tables)) <= 80
    written = EvaluationReceipt.model_validate_json((tmp_path / "receipt.json").read_text())
    assert written.modalities == receipt.modalities
    status, shown, _ = command(*pair, "--max-kl", worst / 2, "--json")
    assert status == 1
    assert json.loads(shown)["gates"][0]["verdict"] == "fail"
    assert EvaluationReceipt.model_validate_json(shown).verdict.value == "fail"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "needs --against REFERENCE, or --lm-eval TASKS"),
        (("--lm-eval", "x", "--max-kl", 1), "--max-kl is not for --lm-eval"),
        (("--lm-eval", "x", "--against", "y"), "--lm-eval judges one model"),
        (("--sensitivity", "--against", "y", "--min-top1", 0.5), "--min-top1 is not for --sensitivity"),
        (("--against", "y", "--limit", 3), "--limit is for --lm-eval or --sensitivity"),
        (("--against", "y", "--receipt", "/no/folder/r.json"), "cannot write /no/folder/r.json"),
        (("--against", "y", "--receipt", "/"), "cannot write /: it is a folder"),
        (("--against", "y", "--receipt", ""), "cannot write .: it is a folder"),
        (("--against", "/no/folder"), "/no/folder"),
    ],
)
def test_refusals_are_one_line(command: Any, tiny_omni: Path, arguments: tuple[object, ...], told: str) -> None:
    status, shown, talk = command(tiny_omni, *arguments)
    assert (status, shown) == (2, "")
    assert told in talk
    assert talk.startswith("error: ")
    assert talk.count("\n") == 1


def test_an_interrupted_run_says_how_it_goes_on(tiny_omni: Path, few: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of the reference; the same command then finds what was done."""
    program = [sys.executable, "-m", "omnifp4", "evaluate", tiny_omni, "--against", tiny_omni, "--cache", tmp_path]
    running = subprocess.Popen(
        [*map(str, program), "--no-speech"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    end = time.monotonic() + 120
    while not list(tmp_path.glob("reference-*/*-floor.npz")) and running.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, talk = running.communicate(timeout=60)
    assert running.returncode == 130, talk
    assert talk.splitlines()[-1] == "interrupted; the same command goes on where this one stopped"
    kept = len(list(tmp_path.glob("reference-*/*-floor.npz")))

    from omnifp4 import evaluate

    found = evaluate(tiny_omni, against=tiny_omni, cache=tmp_path, speech=False, samples=1)
    assert kept > 0
    assert found.reference_cached > 0
