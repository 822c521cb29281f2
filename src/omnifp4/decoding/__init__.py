"""Text, token by token, from a thinker: one interface, and the engines that stand behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnifp4.decoding.choosing import choose_engine
    from omnifp4.decoding.engine import DecodingError, Engine, EngineFull, Sampling, Sequence
    from omnifp4.decoding.module_engine import ModuleEngine

_HOMES = {
    "DecodingError": "engine",
    "Engine": "engine",
    "EngineFull": "engine",
    "ModuleEngine": "module_engine",
    "Sampling": "engine",
    "Sequence": "engine",
    "choose_engine": "choosing",
}

__all__ = ["DecodingError", "Engine", "EngineFull", "ModuleEngine", "Sampling", "Sequence", "choose_engine"]


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported before it is used.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"omnifp4.decoding.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
