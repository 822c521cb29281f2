"""Lets Transformers be imported beside a torchvision that was built for another torch."""

from __future__ import annotations

import importlib.util

import pytest

import omnifp4  # noqa: F401 - mends torchvision beside a CPU build of torch


@pytest.fixture(scope="session")
def transformers():  # type: ignore[no-untyped-def]
    """The Transformers package, or a skip where it, torch or safetensors is not installed."""
    for package in ("transformers", "torch", "safetensors"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import transformers as package

    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    return package
