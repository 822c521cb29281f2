"""Quantized checkpoints in every dialect, and Transformers with omnifp4 registered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runtime_artifacts import quantized

from small_checkpoints import SMALL_CONFIGS, random_tensors, write_checkpoint


@pytest.fixture(scope="session")
def transformers() -> Any:
    """Transformers, as a program has it that imports omnifp4 first."""
    pytest.importorskip("torch", reason="torch is not installed")
    from omnifp4.runtime import install

    install()
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    return package


@pytest.fixture(scope="session")
def artifact(tiny_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes, once each, the tiny omni in a dialect (``format``), with a recipe and a scale rule."""
    made: dict[tuple[str, str, str], Path] = {}
    home = tmp_path_factory.mktemp("artifacts")

    def make(format: str = "modelopt", recipe: str = "nvfp4", rule: str = "sweep") -> Path:
        key = (format, recipe, rule)
        if key not in made:
            made[key] = quantized(tiny_omni, home / "-".join(key), *key)
        return made[key]

    return make


@pytest.fixture(scope="session")
def sibling(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small quantized checkpoint of a model type, with the scales that other tools choose."""
    made: dict[str, Path] = {}
    home = tmp_path_factory.mktemp("siblings")

    def make(name: str) -> Path:
        if name not in made:
            config = SMALL_CONFIGS[name] | {"dtype": "bfloat16"}
            wide = write_checkpoint(home / f"{name}-wide", config, random_tensors(home / f"{name}-random", config))
            made[name] = quantized(wide, home / name, "compressed-tensors", "nvfp4", "max")
        return made[name]

    return make


@pytest.fixture(scope="session")
def tokens() -> Any:
    """Token ids, int64 [2, 21]."""
    import torch

    return torch.randint(0, 90, (2, 21), generator=torch.Generator().manual_seed(0))
