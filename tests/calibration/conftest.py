"""One capture of the tiny model that many tests read, and the inputs it must have seen, from the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from whole_model import Seen

from torch_threads import one_torch_thread

SAMPLES = 8


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes objects as a JSONL file."""

    def write(*lines: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(one) + "\n" for one in lines), "utf-8")
        return path

    return write


@pytest.fixture
def calibrate() -> Callable[..., Any]:
    """The verb, without speech unless it is asked for: that loads the whole model."""
    pytest.importorskip("transformers")
    from omnifp4 import calibrate

    def run(*values: Any, **options: Any) -> Any:
        return calibrate(*values, **({"speech": False, "samples": 4} | options))

    return run


@pytest.fixture(scope="session")
def captured(tiny_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A statistics file of `SAMPLES` bundled conversations, speech too, and the receipt."""
    pytest.importorskip("transformers")
    from omnifp4 import calibrate

    out = tmp_path_factory.mktemp("captured") / "statistics.safetensors"
    return out, calibrate(tiny_omni, out, samples=SAMPLES, speech=True)


@pytest.fixture(scope="session")
def sequences(tiny_omni: Path) -> list[Any]:
    """The same conversations as sequences."""
    pytest.importorskip("transformers")
    from omnifp4.calibration.conversations import open_set
    from omnifp4.calibration.encoding import open_reader
    from omnifp4.checkpoint.folder import open_checkpoint

    reader = open_reader(open_checkpoint(tiny_omni))
    return [reader.encode(sample) for sample in open_set("bundled", samples=SAMPLES).samples]


@pytest.fixture(scope="session")
def seen(tiny_omni: Path, sequences: list[Any]) -> Seen:
    """Of the session's capture."""
    import torch

    return Seen(tiny_omni, sequences, torch.bfloat16)
