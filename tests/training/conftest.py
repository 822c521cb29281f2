"""A small set of training data and the model before its training, once per session."""

from __future__ import annotations

import importlib.util
import random
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

for needed in ("torch", "transformers", "torchvision", "sklearn"):
    if importlib.util.find_spec(needed) is None:
        collect_ignore_glob = ["test_*.py"]

SPEAKERS = ("george", "jackson", "lucas", "nicolas")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from training.data import tokenizer

    from omnifp4.runtime.torchvision_on_cpu import declare_missing_operators

    declare_missing_operators()
    return tokenizer()


@pytest.fixture(scope="session")
def data_file(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pictures; of four speakers one recording of each digit to learn from and one held out; made-up text."""
    from training import data

    home = tmp_path_factory.mktemp("training_data")
    recordings = home / "recordings"
    recordings.mkdir()
    samples = Path(str(files("omnifp4.evaluation"))) / "samples"
    for speaker in SPEAKERS:
        for digit in range(10):
            shutil.copyfile(samples / f"{digit}_{speaker}_0.wav", recordings / f"{digit}_{speaker}_0.wav")
            shutil.copyfile(samples / f"{digit}_{speaker}_1.wav", recordings / f"{digit}_{speaker}_7.wav")
    draw = random.Random(0)
    words = [
        "the",
        "king",
        "and",
        "his",
        "men",
        "came",
        "to",
        "a",
        "house",
        "by",
        "the",
        "river",
        "where",
        "it",
        "was",
        "warm",
        "so",
        "they",
        "stayed",
        "there",
    ]
    lines = [" ".join(draw.choice(words) for _ in range(120)) + "." for _ in range(120)]
    (home / "text.txt").write_text("\n".join(lines), "utf-8")
    out = home / "data.npz"
    data.prepare(recordings, [home / "text.txt"], tokenizer, out)
    return out


@pytest.fixture(scope="session")
def data(data_file: Path) -> Any:
    from training.data import load

    return load(data_file)


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    from training.architecture import trained_config

    return trained_config()


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> Any:
    """Untrained; tests must not change its weights."""
    from training.architecture import build

    return build(0).eval()


@pytest.fixture(scope="session")
def processor(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the trained model: it scales pictures down to 128 x 128 pixels."""
    from transformers import Qwen3OmniMoeProcessor

    from omnifp4.tiny import write_tiny_omni

    folder = write_tiny_omni(tmp_path_factory.mktemp("processor") / "omni")
    return Qwen3OmniMoeProcessor.from_pretrained(folder, local_files_only=True)
