"""Lets Transformers be imported beside a torchvision that was built for another torch."""

from __future__ import annotations

import importlib.util

import pytest

_KEPT: list[object] = []


@pytest.fixture(scope="session")
def transformers():  # type: ignore[no-untyped-def]
    """The Transformers package, or a skip where it, torch or safetensors is not installed."""
    for package in ("transformers", "torch", "safetensors"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    _let_torchvision_be_imported()
    import transformers as package

    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    return package


def _let_torchvision_be_imported() -> None:
    """Declares two operators that a CUDA build of torchvision lacks beside a CPU build of torch."""
    import torch

    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # The declarations end with the object that made them.
        _KEPT.append(library)
