"""generate, chat, doctor and diagnose as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import refused, run

pytest.importorskip("transformers")
sf = pytest.importorskip("soundfile")

pytestmark = pytest.mark.xdist_group("talk")


def test_generate_answers_and_speaks(tiny_artifact: Path, tmp_path: Path) -> None:
    wav = tmp_path / "answer.wav"
    done = run("generate", tiny_artifact, "--prompt", "Hello", "--max-tokens", 6, "--speak", wav, "--speaker", "ethan")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "real-time factor" in done.stderr
    assert "Warning" not in done.stderr
    waveform, rate = sf.read(wav)
    assert rate == 24_000
    assert abs(waveform).max() > 0.0


def test_generate_is_the_same_for_the_same_seed(tiny_artifact: Path) -> None:
    command = ["generate", tiny_artifact, "-p", "Hello", "--max-tokens", 8, "--temperature", 1.0, "--seed", 3]
    assert run(*command).stdout == run(*command).stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-p", "Hi", "--speaker", "nobody", "--speak", "o.wav"], "nobody"),
        (["-p", "Hi", "--image", "missing.png"], "missing.png"),
        (["-p", "Hi", "--image", "https://127.0.0.1/x.png"], "--allow-urls"),
        (["-p", "Hi", "--context", "guess"], "guess"),
    ],
)
def test_generate_refuses_in_one_line(tiny_artifact: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    refused(run("generate", tiny_artifact, *arguments, cwd=tmp_path), told)


def test_a_story_of_five_turns_goes_on_after_mistakes(tiny_artifact: Path) -> None:
    turns = ["Tell a story of a dragon.", "/nonsense", "Where does it live?", "/image missing.png", "Who comes?"]
    turns += ["What do they say?", "How does it end?", "/quit"]
    done = run("chat", tiny_artifact, "--no-speech", "--max-tokens", 5, input="\n".join(turns) + "\n")
    assert done.returncode == 0, done.stderr
    figures = [line for line in done.stderr.splitlines() if "tok/s" in line]
    assert len(figures) == 5
    prompt_tokens = [int(line.split(" + ")[0]) for line in figures]
    assert prompt_tokens == sorted(set(prompt_tokens)), "each turn builds on the last"
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 2


def test_doctor_tells_what_runs_the_artifact(tiny_artifact: Path) -> None:
    done = run("doctor", tiny_artifact, "--json")
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)
    assert receipt["can_run"]
    assert "Transformers" in run("doctor", tiny_artifact).stdout


def test_doctor_exits_with_1_where_nothing_can_run(tmp_path: Path, tiny_artifact: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_artifact.iterdir():
        data = path.read_bytes()
        (broken / path.name).write_bytes(data[:-64] if path.suffix == ".safetensors" else data)
    assert run("doctor", broken).returncode == 1


def test_diagnose_explains_a_failing_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import no_such_module_at_all\n")
    done = run("diagnose", script)
    assert done.returncode == 1
    assert "no_such_module_at_all" in done.stdout
    script.write_text("import sys; print('fine', sys.argv[1:])\n")
    done = run("diagnose", script, "--", "--flag", "7")
    assert done.returncode == 0, done.stdout
    assert "fine ['--flag', '7']" in done.stderr
