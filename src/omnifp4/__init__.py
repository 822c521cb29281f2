"""omnifp4: take an omni-modal checkpoint to NVFP4, prove that the result is right, and run it.

Importing this package teaches Transformers to load packed NVFP4 checkpoints: when it is imported, before or after, its
own extension points are used. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from omnifp4.runtime.import_hook import install

if TYPE_CHECKING:
    from omnifp4.api import (
        bench,
        calibrate,
        compare,
        convert,
        dataset,
        evaluate,
        plan,
        quantize,
        repair,
        sensitivity,
        speech_recipe,
        verify,
    )
    from omnifp4.chat import OmniChat
    from omnifp4.errors import OmniFP4Error
    from omnifp4.report.writing import write_report
    from omnifp4.runtime import load

__all__ = [
    "OmniChat",
    "OmniFP4Error",
    "bench",
    "calibrate",
    "compare",
    "convert",
    "dataset",
    "evaluate",
    "load",
    "plan",
    "quantize",
    "repair",
    "sensitivity",
    "speech_recipe",
    "verify",
    "write_report",
]

HOMES: Final = {
    "OmniChat": "omnifp4.chat",
    "OmniFP4Error": "omnifp4.errors",
    "load": "omnifp4.runtime",
    "write_report": "omnifp4.report.writing",
}
"""Where a name comes from; the verbs are in ``omnifp4.api``."""

install()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(HOMES.get(name, "omnifp4.api")), name)
