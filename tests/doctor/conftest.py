"""Checkpoints to examine, and every script of the seeds' failures run once, two at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from doctor_scripts import SCRIPTS, STAND_INS, Script

from omnifp4 import api
from omnifp4.doctor import diagnose
from omnifp4.receipt.diagnosis import DiagnosisReceipt
from omnifp4.tiny import write_tiny_omni

Diagnosed = Callable[[str], DiagnosisReceipt]


def pytest_configure(config: pytest.Config) -> None:
    # Known to pytest-xdist, which may not be there: the scripts' diagnoses are made once, by one worker.
    config.addinivalue_line("markers", "xdist_group(name): tests that one worker runs")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_omni(tmp_path_factory.mktemp("doctor") / "tiny", random_weights=True)


@pytest.fixture(scope="session")
def nvfp4(tiny: Path) -> Path:
    """The tiny model in ModelOpt's form."""
    out = tiny.parent / "nvfp4"
    api.quantize(tiny, out, threads=1, check=False)
    return out


@pytest.fixture(scope="session")
def compressed(tiny: Path) -> Path:
    """The tiny model in compressed-tensors' form."""
    out = tiny.parent / "compressed"
    api.quantize(tiny, out, threads=1, check=False, format="compressed-tensors")
    return out


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint with a changed config; files named in `without` are left out."""

    def make(source: Path, without: tuple[str, ...] = (), **changes: Any) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*without))
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def write_script(folder: Path, script: Script, **paths: Path) -> Path:
    """The script's file, with its stand-in modules beside it."""
    folder.mkdir(parents=True)
    spec = importlib.util.find_spec("omnifp4.runtime.torchvision_on_cpu")
    assert spec is not None and spec.origin is not None
    # Beside the script and by itself, so that the script does not import omnifp4.
    shutil.copy(spec.origin, folder / "torchvision_on_cpu.py")
    for name in script.stand_ins:
        for path, text in STAND_INS[name].items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    text = script.text
    for name, path in {**paths, "home": folder}.items():
        text = text.replace(f"<{name}>", str(path))
    file = folder / "user_script.py"
    file.write_text(text)
    return file


@pytest.fixture(scope="session")
def diagnosed(
    tiny: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Diagnosed]:
    """The diagnosis of a script of `SCRIPTS`, by name; those that the session needs run in the background."""
    home = tmp_path_factory.mktemp("scripts")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    texts = {Path(item.fspath).read_text() for item in request.session.items if "diagnosed" in item.fixturenames}
    names = [name for name in SCRIPTS if any(f'"{name}"' in text for text in texts)]
    quantized = request.getfixturevalue("nvfp4")
    compressed = request.getfixturevalue("compressed")
    pool = ThreadPoolExecutor(2)

    def work(name: str) -> DiagnosisReceipt:
        script = SCRIPTS[name]
        file = write_script(home / name, script, tiny=tiny, nvfp4=quantized, compressed=compressed)
        return diagnose(file, script.arguments, timeout=100, stall_seconds=script.stall_seconds)

    missing = [n for n in ("torch", "transformers", "torchvision", "PIL") if importlib.util.find_spec(n) is None]
    runs: dict[str, Future[DiagnosisReceipt]] = {}
    for name in sorted(names, key=lambda name: not SCRIPTS[name].heavy):
        if not (missing and SCRIPTS[name].heavy):
            runs[name] = pool.submit(work, name)

    def result(name: str) -> DiagnosisReceipt:
        if missing and SCRIPTS[name].heavy:
            pytest.skip(f"{missing[0]} is not installed")
        return runs[name].result()

    yield result
    pool.shutdown(cancel_futures=True)
