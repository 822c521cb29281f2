"""Checkpoints that several rooms test with; they are written once a session and never changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from omnifp4.tiny import write_tiny_omni

# Read when huggingface_hub is first imported: a test that asks the network for anything fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled tiny omni checkpoint, in one shard. Tests must not write to it."""
    return write_tiny_omni(tmp_path_factory.mktemp("tiny_omni") / "tiny-omni")


@pytest.fixture(scope="session")
def tiny_artifact(tiny_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_omni` quantized with the defaults (ModelOpt, sweep). Tests must not write to it."""
    from omnifp4 import quantize

    out = tmp_path_factory.mktemp("tiny_artifact") / "tiny-omni-nvfp4"
    quantize(tiny_omni, out, threads=2)
    return out
