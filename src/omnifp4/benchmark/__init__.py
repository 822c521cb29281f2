"""Measures models: memory, load time, time to first token, speed, speech; beside what the machine's memory allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnifp4.benchmark.run import run_bench
    from omnifp4.benchmark.settings import Settings
    from omnifp4.benchmark.subject import Subject

__all__ = ["Settings", "Subject", "run_bench"]

_HOMES = {"Settings": "settings", "Subject": "subject", "run_bench": "run"}


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported before it is used.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"omnifp4.benchmark.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
