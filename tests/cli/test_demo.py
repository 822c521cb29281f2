"""`omnifp4 demo`: the whole path on the bundled model, as `make demo` runs it."""

from __future__ import annotations

import json
import re
import subprocess
import wave
from pathlib import Path

import pytest
from command_line import run

from omnifp4.report.gathering import gather
from small_checkpoints import folder_bytes

TOLD = re.compile(r"planned ([\d,]+) bytes of weights, wrote ([\d,]+)")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "demo"


@pytest.fixture(scope="module")
def shown(home: Path) -> subprocess.CompletedProcess[str]:
    done = run("demo", home, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_it_ends_with_the_page_s_path(shown: subprocess.CompletedProcess[str], home: Path) -> None:
    page = Path(shown.stdout.splitlines()[-1])
    assert page == home / "report.html"
    text = page.read_text("utf-8")
    for section in ("proof", "size", "quality", "sensitivity", "weights", "speed", "fit"):
        assert f'<section id="{section}" aria-labelledby="{section}-heading">' in text, section
    assert "Not measured." not in text
    assert str(home) not in text


def test_it_keeps_what_it_plans_and_proves(shown: subprocess.CompletedProcess[str], home: Path) -> None:
    found = TOLD.search(shown.stdout)
    assert found
    assert found[1] == found[2]
    assert "PASS" in shown.stdout
    artifact = home / "tiny-omni-nvfp4"
    assert {"config.json", "omnifp4.json", "README.md", "chat_template.jinja"} <= set(folder_bytes(artifact))
    card = (artifact / "README.md").read_text("utf-8")
    for told in ("## Proof", "## What it costs in answers", "## Where FP4 hurts", "## Speed"):
        assert told in card, told
    record = gather([home / "report.json"])
    assert "quantization" in {file.receipt for file in record.files}
    assert record.evaluations[0].speech is not None
    assert record.sensitivity is not None
    assert record.benches[0].passed


def test_it_talks(shown: subprocess.CompletedProcess[str], home: Path) -> None:
    talk = shown.stdout.partition("talk with it")[2].partition("omnifp4 evaluate --sensitivity")[0]
    asked = re.findall(r"^you    (.+)$", talk, flags=re.M)
    answers = re.findall(r"^model  (.*?)  \((right|the answer is .+)\)$", talk, flags=re.M)
    assert len(asked) == len(answers) == 5
    assert sum(".png]" in line for line in asked) >= 2
    assert sum(".wav]" in line for line in asked) >= 2
    with wave.open(str(home / "answer.wav")) as file:
        assert file.getframerate() == 24_000
        assert 0.1 < file.getnframes() / file.getframerate() <= 4.1


def test_every_expert_has_its_place_on_the_map(shown: subprocess.CompletedProcess[str], home: Path) -> None:
    config = json.loads((home / "tiny-omni" / "config.json").read_text("utf-8"))["thinker_config"]["text_config"]
    assert "Experts\n" in shown.stdout
    rest = re.search(r"… (\d+) more", shown.stdout)
    assert rest
    assert int(rest[1]) + 8 == config["num_hidden_layers"] * config["num_experts"]


def test_a_folder_with_something_in_it_is_left_alone(shown: subprocess.CompletedProcess[str], home: Path) -> None:
    before = json.dumps(sorted(folder_bytes(home)))
    again = run("demo", home)
    assert again.returncode == 2
    assert "not empty" in again.stderr
    assert json.dumps(sorted(folder_bytes(home))) == before
