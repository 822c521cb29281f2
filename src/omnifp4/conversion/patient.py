"""What a repair works on, and what it has decided to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omnifp4.checkpoint.dialects import Activations
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.conversion.artifact import Artifact
from omnifp4.conversion.inspection import LinearState
from omnifp4.conversion.ledger import Ledger
from omnifp4.conversion.original import Original
from omnifp4.models.source import SourceTensor


@dataclass
class Patient:
    """An artifact under repair.

    Attributes:
        artifact: with the config as it will be, but for its quantization_config.
        reader: of its files.
        states: what its linears hold that stay in NVFP4.
        changed: recorded checksum of every tensor that has other bytes than omnifp4.json says.
        original: the wide checkpoint, if one was given.
        estimate: lost numbers may be guessed.
        ledger: what was found.
    """

    artifact: Artifact
    reader: CheckpointReader
    states: Mapping[str, LinearState]
    changed: Mapping[str, int]
    original: Original | None
    estimate: bool
    ledger: Ledger


@dataclass
class Treatment:
    """What will be written otherwise than it was.

    Attributes:
        dropped: names of tensors that go.
        fetched: tensors copied from the original, by the name they get.
        widened: modules that are in NVFP4 and become wide.
        decoded: of them, those whose weights are decoded from the artifact.
        encoded: linears encoded from the original, by scale group.
        own: of them, those encoded from the artifact's own wide weights.
        swapped: modules whose codes change places.
        mended: modules whose codes or block scales are written anew.
        restored: tensor scales, as stored, that the codes of a module were really made for.
        tensor_scales: new tensor scales as stored, by module, where codes and block scales are fitted to them.
        input_scales: new input scales as stored, by module.
        side_files: files copied from the original, by path in the folder.
        activations: of the new config.
        quantization_config: of the new config; empty where the old one stays.
    """

    dropped: set[str] = field(default_factory=set)
    fetched: dict[str, SourceTensor | TensorEntry] = field(default_factory=dict)
    widened: set[str] = field(default_factory=set)
    decoded: set[str] = field(default_factory=set)
    encoded: dict[str, tuple[SourceTensor, ...]] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    swapped: set[str] = field(default_factory=set)
    mended: set[str] = field(default_factory=set)
    restored: dict[str, np.float32] = field(default_factory=dict)
    tensor_scales: dict[str, np.float32] = field(default_factory=dict)
    input_scales: dict[str, np.float32] = field(default_factory=dict)
    side_files: dict[Path, Path] = field(default_factory=dict)
    activations: Activations = Activations.WIDE
    quantization_config: dict[str, Any] = field(default_factory=dict)

    @property
    def encoded_modules(self) -> dict[str, SourceTensor]:
        """The linears encoded from the original, by module."""
        return {tensor.spec.module: tensor for tensors in self.encoded.values() for tensor in tensors}
