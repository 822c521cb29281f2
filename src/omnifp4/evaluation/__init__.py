"""What a model loses against its reference: divergence by modality, right answers, speech; and tasks of lm-eval.

Importing this package imports no torch; its functions do when they are called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnifp4.evaluation.comparison import run_comparison
    from omnifp4.evaluation.gates import Limits
    from omnifp4.evaluation.harness import run_harness
    from omnifp4.evaluation.run import Settings, run_evaluation
    from omnifp4.evaluation.sensitivity import SensitivitySettings, run_sensitivity
    from omnifp4.evaluation.speech_search import SpeechSearchSettings, search_speech
    from omnifp4.evaluation.store import default_cache

__all__ = [
    "Limits",
    "SensitivitySettings",
    "Settings",
    "SpeechSearchSettings",
    "default_cache",
    "run_comparison",
    "run_evaluation",
    "run_harness",
    "run_sensitivity",
    "search_speech",
]

_HOMES = {
    "Limits": "omnifp4.evaluation.gates",
    "default_cache": "omnifp4.evaluation.store",
    "Settings": "omnifp4.evaluation.run",
    "run_evaluation": "omnifp4.evaluation.run",
    "run_comparison": "omnifp4.evaluation.comparison",
    "run_harness": "omnifp4.evaluation.harness",
    "SensitivitySettings": "omnifp4.evaluation.sensitivity",
    "run_sensitivity": "omnifp4.evaluation.sensitivity",
    "SpeechSearchSettings": "omnifp4.evaluation.speech_search",
    "search_speech": "omnifp4.evaluation.speech_search",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from omnifp4.runtime.import_hook import install

    install()
    return getattr(import_module(_HOMES[name]), name)
