"""Runs NVFP4 checkpoints in Transformers: loading, packed modules, progress and stall watch.

Importing this package imports neither torch nor Transformers; its names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnifp4.runtime.backends import choose_backend
    from omnifp4.runtime.import_hook import install
    from omnifp4.runtime.loading import load
    from omnifp4.runtime.packed import NVFP4Linear, PackedExperts
    from omnifp4.runtime.registration import register

__all__ = ["NVFP4Linear", "PackedExperts", "choose_backend", "install", "load", "register"]

_HOMES = {
    "NVFP4Linear": "omnifp4.runtime.packed",
    "PackedExperts": "omnifp4.runtime.packed",
    "choose_backend": "omnifp4.runtime.backends",
    "install": "omnifp4.runtime.import_hook",
    "load": "omnifp4.runtime.loading",
    "register": "omnifp4.runtime.registration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from omnifp4.runtime.import_hook import install

    # Before the first of these imports Transformers, and with it torchvision.
    install()
    return getattr(import_module(_HOMES[name]), name)
