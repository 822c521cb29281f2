"""omnifp4: take an omni-modal checkpoint to NVFP4, and prove that the result is right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from omnifp4.api import convert, plan, quantize, repair, verify
    from omnifp4.errors import OmniFP4Error

VERBS: Final = ("convert", "plan", "quantize", "repair", "verify")

__all__ = ["OmniFP4Error", "convert", "plan", "quantize", "repair", "verify"]


def __getattr__(name: str) -> Any:
    # Verbs are imported when they are first used, so that `import omnifp4` costs nothing.
    if name == "OmniFP4Error":
        from omnifp4.errors import OmniFP4Error

        return OmniFP4Error
    if name in VERBS:
        return _verb(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _verb(name: str) -> Callable[..., Any]:
    from omnifp4 import api

    verb: Callable[..., Any] = getattr(api, name)
    return verb


class _Room(ModuleType):
    """A room that has a verb's name, such as ``omnifp4.quantize``: called, it is the verb."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.__wrapped__(*arguments, **options)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return _verb(self.__name__.rpartition(".")[2])


class _Package(ModuleType):
    """This package. Importing a room puts the module where the verb was: it must stay callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in VERBS and type(value) is ModuleType:
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
