"""Checkpoints that several rooms test with; they are written once a session and never changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from unittest.mock import patch

import pytest

from omnifp4.tiny import write_tiny_omni

# Read when huggingface_hub is first imported: a test that asks the network for anything fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests that are not marked ``cuda`` run on the CPU on a machine with a GPU too, what they start included.

    Those of Triton kernels, which choose their device themselves, are left alone.
    """
    torch = sys.modules.get("torch")
    chooses = item.get_closest_marker("cuda") or hasattr(getattr(item, "module", None), "ON_GPU")
    if torch is None or chooses or not torch.cuda.is_available():
        return (yield)
    with patch.object(torch.cuda, "is_available", lambda: False), patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        return (yield)


@pytest.fixture(scope="session")
def tiny_omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny omni checkpoint of random weights, in one shard. Tests must not write to it."""
    return write_tiny_omni(tmp_path_factory.mktemp("tiny_omni") / "tiny-omni", random_weights=True)


@pytest.fixture(scope="session")
def trained_omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled, trained tiny omni checkpoint, in one shard. Tests must not write to it."""
    return write_tiny_omni(tmp_path_factory.mktemp("trained_omni") / "tiny-omni")


@pytest.fixture(scope="session")
def tiny_artifact(tiny_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_omni` quantized with the defaults (ModelOpt, sweep). Tests must not write to it."""
    from omnifp4 import quantize

    out = tmp_path_factory.mktemp("tiny_artifact") / "tiny-omni-nvfp4"
    quantize(tiny_omni, out, threads=2)
    return out


@pytest.fixture(scope="session")
def mixed_artifacts(tiny_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`tiny_omni` in several schemes, by dialect, and their fake-quant twins, by dialect and "-fake". Not to be written to."""
    from omnifp4 import quantize
    from small_checkpoints import MIXED_COMPONENTS

    home = tmp_path_factory.mktemp("mixed")
    for dialect, components in MIXED_COMPONENTS.items():
        quantize(tiny_omni, home / dialect, threads=2, components=components, format=dialect)
        quantize(tiny_omni, home / f"{dialect}-fake", threads=2, components=components, format="fake-quant")
    return {path.name: path for path in home.iterdir()}
