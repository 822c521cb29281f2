"""The tiny checkpoint of random weights once per session, and its model and processor where transformers and torchvision are there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from omnifp4.tiny import write_tiny_omni


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_omni(tmp_path_factory.mktemp("tiny") / "omni", random_weights=True)


@pytest.fixture(scope="session")
def transformers() -> Any:
    pytest.importorskip("torch", reason="torch is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="session")
def loaded(transformers: Any, tiny_folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model, and what from_pretrained said about its keys."""
    import torch

    model, told = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        tiny_folder, dtype=torch.bfloat16, output_loading_info=True, local_files_only=True
    )
    # Transformers 5.17 to 5.23 read thinker settings from the talker's config when speech follows an audio input.
    model.talker.config.audio_config = model.thinker.config.audio_config
    return model.eval(), told


@pytest.fixture(scope="session")
def model(loaded: tuple[Any, dict[str, Any]]) -> Any:
    return loaded[0]


@pytest.fixture(scope="session")
def processor(transformers: Any, tiny_folder: Path) -> Any:
    for needed in ("torchvision", "PIL"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"the processor needs {needed}, which is not installed")
    return transformers.Qwen3OmniMoeProcessor.from_pretrained(tiny_folder, local_files_only=True)
