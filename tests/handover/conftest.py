"""Artifacts to hand over, GPUs to hand them to, and stand-in engines."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handover_machines import machine

from omnifp4 import api
from omnifp4.handover import artifact, process, serving
from omnifp4.receipt.doctor import Accelerator

STAND_IN = Path(__file__).with_name("stand_in_engine.py")


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second between two looks at an engine would be most of these tests' time."""
    monkeypatch.setattr(process, "POLL_S", 0.02)
    monkeypatch.setattr(serving, "WATCH_S", 0.02)


@pytest.fixture(scope="session")
def modelopt(tiny_artifact: Path) -> Path:
    return tiny_artifact


@pytest.fixture(scope="session")
def compressed(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("handover") / "tiny-ct"
    api.convert(tiny_artifact, out, format="compressed-tensors", threads=2)
    return out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this machine one with the given GPUs."""

    def put(*gpus: Accelerator) -> None:
        monkeypatch.setattr(artifact, "this_machine", lambda python: machine(*gpus))

    return put


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """An interpreter that is no interpreter; see `stand_in_engine`."""
    program = tmp_path / "environment" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def options(tmp_path: Path, stand_in: Path) -> dict[str, Any]:
    return {"cache": tmp_path / "cache", "python": stand_in, "stop_after_smoke": True, "start_timeout_s": 20.0}
