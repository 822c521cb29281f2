"""What a person may ask of the hand-over; unknown names are refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from omnifp4.errors import OmniFP4Error

ENGINES: Final = ("vllm", "vllm-omni")


@dataclass(frozen=True, slots=True)
class Options:
    """Everything has a default that is derived from the artifact, the environment and the GPUs.

    Attributes:
        python: interpreter of an environment that has the engine; None: the one that ``omnifp4 engine install`` made.
        max_model_len: tokens of context; None: what the memory holds.
        gpu_memory_utilization: share of each GPU that the engine may take; None: from the free memory.
        tensor_parallel: GPUs that share the text decoder; None: as many as are here and divide it.
        seed: of sampling, in every stage.
        emulate: true W4A4 numerics on a GPU without FP4 units: slow, for checks only.
        smoke: send one request in each modality once the engine is healthy.
        stop_after_smoke: stop then, and return.
        start_timeout_s: the longest start.
        max_speech_seconds: of one spoken answer.
        served_model_name: what clients call the model; the folder's name if empty.
        api_key: that clients must send; empty: none.
        cache: folder for converted artifacts, deploy files and logs.
        extra: arguments that are handed to the engine as they are.
    """

    python: Path | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel: int | None = None
    seed: int = 0
    emulate: bool = False
    smoke: bool = True
    stop_after_smoke: bool = False
    start_timeout_s: float = 900.0
    max_speech_seconds: float = 300.0
    served_model_name: str = ""
    api_key: str = ""
    cache: Path | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        length, share, parallel = self.max_model_len, self.gpu_memory_utilization, self.tensor_parallel
        checks = (
            (length is None or length >= 1, f"context length {length} is less than 1"),
            (share is None or 0 < share <= 1, f"GPU memory utilization {share} is not above 0 and at most 1"),
            (parallel is None or parallel >= 1, f"tensor parallel size {parallel} is less than 1"),
            (self.max_speech_seconds > 0, f"speech of {self.max_speech_seconds} s is not positive"),
            (self.start_timeout_s > 0, f"start timeout {self.start_timeout_s} is not positive"),
        )
        for good, problem in checks:
            if not good:
                raise OmniFP4Error(problem, hint="omnifp4 serve --help")


def read_options(given: Mapping[str, Any]) -> Options:
    """Options from names and values; a value of None counts as not given.

    Raises:
        OmniFP4Error: an unknown name, or a value that makes no sense.
    """
    known = [field.name for field in fields(Options)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise OmniFP4Error(f"option {unknown[0]!r} is unknown to the hand-over", hint=f"known: {', '.join(known)}")
    values = {name: value for name, value in given.items() if value is not None}
    for name in ("python", "cache"):
        if name in values:
            values[name] = Path(values[name]).expanduser()
    if "extra" in values:
        values["extra"] = tuple(values["extra"])
    return Options(**values)


def check_engine(engine: str) -> str:
    """The engine's name; raises OmniFP4Error if there is no such engine."""
    if engine not in ENGINES:
        raise OmniFP4Error(f"engine {engine!r} is unknown", hint=f"known: {', '.join(ENGINES)}")
    return engine


def data_folder() -> Path:
    """Where environments of engines are kept: ``$XDG_DATA_HOME/omnifp4``."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "omnifp4"


def cache_folder(options: Options) -> Path:
    """Where converted artifacts, deploy files and logs are kept: as asked for, or ``$XDG_CACHE_HOME/omnifp4``."""
    return options.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnifp4"
