"""The tiny omni model, its processor, and conversations on them, once per session."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnifp4.tiny import write_tiny_omni

TESTS = Path(__file__).parent.parent


def _declare_torchvision() -> None:
    """torchvision beside a CPU build of torch; from the package, or from the tests as long as it lives there."""
    if importlib.util.find_spec("omnifp4.runtime") is not None:
        name = "omnifp4.runtime.torchvision_on_cpu"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name).declare_missing_operators()
            return
    path = TESTS / "tiny" / "torchvision_on_cpu.py"
    if path.is_file():
        spec = importlib.util.spec_from_file_location("torchvision_on_cpu_for_chat", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.declare_missing_operators()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_omni(tmp_path_factory.mktemp("chat") / "omni")


@pytest.fixture(scope="session")
def transformers() -> Any:
    pytest.importorskip("torch", reason="torch is not installed")
    _declare_torchvision()
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="session")
def load_tiny(transformers: Any, tiny_folder: Path) -> Callable[[], Any]:
    """Loads a model of one's own, as Transformers alone does: for tests that change or break it."""
    import torch

    def load() -> Any:
        model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(
            tiny_folder, dtype=torch.bfloat16, local_files_only=True
        )
        return model.eval()

    return load


@pytest.fixture(scope="session")
def model(load_tiny: Callable[[], Any]) -> Any:
    return load_tiny()


@pytest.fixture(scope="session")
def processor(transformers: Any, tiny_folder: Path) -> Any:
    for needed in ("torchvision", "PIL"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"the processor needs {needed}, which is not installed")
    return transformers.Qwen3OmniMoeProcessor.from_pretrained(tiny_folder, local_files_only=True)


@pytest.fixture
def new_chat(model: Any, processor: Any) -> Callable[..., Any]:
    """Opens conversations on the shared model: short, greedy answers unless told otherwise."""
    from omnifp4.chat import OmniChat

    def open_chat(**arguments: Any) -> Any:
        defaults = {"processor": processor, "max_new_tokens": 8, "temperature": 0, "max_speech_seconds": 1.0}
        return OmniChat(arguments.pop("model", model), **{**defaults, **arguments})

    return open_chat
