"""omnifp4: take an omni-modal checkpoint to NVFP4, and prove that the result is right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnifp4.api import convert, plan, quantize, repair, verify
    from omnifp4.errors import OmniFP4Error

__all__ = ["OmniFP4Error", "convert", "plan", "quantize", "repair", "verify"]


def __getattr__(name: str) -> Any:
    # Verbs are imported when they are first used, so that `import omnifp4` costs nothing.
    if name == "OmniFP4Error":
        from omnifp4.errors import OmniFP4Error

        return OmniFP4Error
    if name in __all__:
        from omnifp4 import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
