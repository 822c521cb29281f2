"""What this machine and this checkpoint can do together, and why a script failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnifp4.doctor.diagnosis import diagnose, run_diagnose
    from omnifp4.doctor.examination import examine, run_doctor

_HOMES = {
    "diagnose": "diagnosis",
    "examine": "examination",
    "run_diagnose": "diagnosis",
    "run_doctor": "examination",
}

__all__ = ["diagnose", "examine", "run_diagnose", "run_doctor"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"omnifp4.doctor.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
