"""Hand-over to vLLM and vLLM-Omni: the right command for an artifact, an environment and the GPUs that are here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnifp4.handover.environments import install, list_environments
    from omnifp4.handover.serving import serve_with

__all__ = ["install", "list_environments", "serve_with"]

_HOMES = {"install": "environments", "list_environments": "environments", "serve_with": "serving"}


def __getattr__(name: str) -> Any:
    # The command line asks for help without importing any of it.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"omnifp4.handover.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
