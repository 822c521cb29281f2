"""The scales of whole tensors: read before anything is built, because they tell cheaply whether a checkpoint is sound."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from omnifp4.checkpoint.dialects import LinearEntries
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.runtime.placement import Placement

QKV: Final = re.compile(r"(.*\.self_attn)\.[qkv]_proj$")
GATE_UP: Final = re.compile(r"(.*)\.(?:gate|up)_proj$")

NEVER_FUSED: Final = ("audio_tower.", "visual.", "code2wav.")
"""Parts whose projections no engine fuses."""

Scales = Mapping[str, float]
"""The float32 value of each one-value tensor, by name."""


def read_scales(checkpoint: Checkpoint, placement: Placement) -> Scales:
    """Read the tensor scales and input scales of every packed linear.

    Raises:
        CheckpointError: a scale is zero, negative, NaN or infinite, or tensors that must share a scale do not.
    """
    scales: dict[str, float] = {}
    sources = placement.sources
    with CheckpointReader(checkpoint) as reader:
        for source in sources:
            for entry in (source.tensor_scale, source.input_scale):
                if entry is not None:
                    scales[entry.name] = _read(reader, entry, checkpoint.location)
    _check_shared(sources, scales, checkpoint.location)
    return scales


def _read(reader: CheckpointReader, entry: TensorEntry, subject: str) -> float:
    value = float(reader.read(entry).astype(np.float32).reshape(-1)[0])
    if not math.isfinite(value) or value <= 0:
        raise CheckpointError(
            f"{subject}/{entry.shard}: scale {entry.name!r} is {value}; it must be positive and finite"
        )
    return value


def _check_shared(sources: Iterable[LinearEntries], scales: Scales, subject: str) -> None:
    """q, k and v of a layer share one tensor scale, and so do gate and up: engines that fuse them take only one."""
    first: dict[str, TensorEntry] = {}
    for source in sources:
        match = QKV.fullmatch(source.module) or GATE_UP.fullmatch(source.module)
        entry = source.tensor_scale
        if match is None or entry is None or any(part in source.module for part in NEVER_FUSED):
            continue
        other = first.setdefault(match[1], entry)
        if scales[other.name] != scales[entry.name]:
            raise CheckpointError(
                f"{subject}: {other.name!r} is {scales[other.name]:g} but {entry.name!r} is {scales[entry.name]:g}; weights "
                "that are computed together must share one tensor scale",
                hint=f"omnifp4 repair {subject} OUT mends it",
            )
