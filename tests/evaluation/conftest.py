"""A few samples of every modality, and one evaluation that several tests read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_data import FEW

from torch_threads import one_torch_thread


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """As `suited_threads` has it."""
    with one_torch_thread():
        yield


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    """Writes lines as a JSONL file."""

    def write(*lines: Any) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines), "utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples above as a file."""
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in FEW), "utf-8")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def receipt(tiny_omni: Path, tiny_artifact: Path, few: Path, cache: Path) -> Any:
    """The FP4 artifact against its source, speech too."""
    pytest.importorskip("transformers")
    from omnifp4 import evaluate

    return evaluate(tiny_artifact, against=tiny_omni, data=few, cache=cache)
