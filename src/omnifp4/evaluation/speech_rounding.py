"""Single groups of a loaded wide model's linears, rounded through a scheme where they stand and put back again.

What a scheme costs is told by its values alone, so nothing is packed and no artifact is written: tens of candidates cost
one load. The values are those that ``quantize --format fake-quant`` writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.formats import coded, fast_cpu
from omnifp4.formats.nvfp4 import BLOCK_SIZE, Float32Array, ScaleRule
from omnifp4.formats.reference import tensor_scale_for
from omnifp4.formats.scheme import Scheme
from omnifp4.formats.widening import widen
from omnifp4.models.base import Part
from omnifp4.models.source import Source, SourceTensor
from omnifp4.runtime.names import Renaming
from omnifp4.runtime.placement import EXPERT_NAME

SPEAKING = (Part.TALKER, Part.CODE_PREDICTOR)
"""Parts whose linears decide the codes; code2wav makes a waveform of them, and is no target."""


@dataclass(frozen=True)
class Group:
    """Linears that a recipe treats alike.

    Attributes:
        name: of the component.
        tensors: their weights.
    """

    name: str
    tensors: tuple[SourceTensor, ...]

    @property
    def parameters(self) -> int:
        """Of all weights."""
        return sum(tensor.spec.parameters for tensor in self.tensors)

    def holds(self, scheme: Scheme) -> bool:
        """Whether every width fits the scheme."""
        return all(tensor.spec.shape[1] % scheme.width_multiple == 0 for tensor in self.tensors)


def groups_of(source: Source, parts: Sequence[Part]) -> tuple[Group, ...]:
    """The components of some parts that have linears, in layout order."""
    found: dict[str, list[SourceTensor]] = {}
    for tensor in source.tensors:
        if tensor.spec.is_linear and tensor.spec.component.part in parts:
            found.setdefault(tensor.spec.component.name, []).append(tensor)
    return tuple(Group(name, tuple(tensors)) for name, tensors in found.items())


class Rounder:
    """Rounds weights of one loaded model."""

    def __init__(self, model: Any, source: Source, reader: CheckpointReader, rule: ScaleRule) -> None:
        """Takes a model.

        Args:
            model: loaded wide from `source`, with speech.
            source: its checkpoint.
            reader: of the same.
            rule: of all scales.
        """
        self._source, self._reader, self._rule = source, reader, rule
        self._renaming = Renaming(model)
        self._state = cast(dict[str, Tensor], dict(model.state_dict()))

    @contextmanager
    def rounded(self, schemes: Mapping[Group, Scheme]) -> Iterator[None]:
        """Inside, the model has the rounded values of these groups; behind, its own again, read anew.

        Raises:
            CheckpointError: a weight has no place in the model, or cannot be encoded.
        """
        try:
            for group, scheme in schemes.items():
                for tensors in _sharing(group.tensors):
                    self._put(tensors, rounded_values(self._wide(tensors), scheme, self._rule))
            yield
        finally:
            for group in schemes:
                for tensor in group.tensors:
                    self._put([tensor], self._wide([tensor]))

    def _wide(self, tensors: Sequence[SourceTensor]) -> list[Float32Array]:
        return [np.ascontiguousarray(widen(tensor.read(self._reader), tensor.entry.dtype)) for tensor in tensors]

    def _put(self, tensors: Sequence[SourceTensor], values: Sequence[Float32Array]) -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                self._place(tensor).copy_(torch.from_numpy(value))

    def _place(self, tensor: SourceTensor) -> Tensor:
        """Where the model has a weight, ``[out, in]``: a view, of experts that are one tensor in memory too."""
        match = EXPERT_NAME.fullmatch(tensor.spec.module)
        if match is None:
            found = self._state.get(self._renaming.target(tensor.spec.name))
        else:
            down = match["part"] == "down_proj"
            whole = self._state.get(
                self._renaming.target(f"{match['experts']}.{'down_proj' if down else 'gate_up_proj'}")
            )
            found = None if whole is None else whole[int(match["number"])]
            if found is not None and not down:
                found = found.chunk(2)[0 if match["part"] == "gate_proj" else 1]
        if found is None or tuple(found.shape) != tensor.spec.shape:
            raise CheckpointError(
                f"{self._source.checkpoint.location}: {tensor.spec.name!r} has no place of its shape in the model"
            )
        return found


def rounded_values(weights: Sequence[Float32Array], scheme: Scheme, rule: ScaleRule) -> list[Float32Array]:
    """What weights ``[out, in]`` decode to that share one tensor scale.

    Raises:
        ValueError: a value is NaN, infinite or too large.
    """
    if scheme is not Scheme.NVFP4:
        return [coded.decode(coded.encode(weight, scheme, rule)) for weight in weights]
    scale = tensor_scale_for(max(float(np.abs(weight).max()) for weight in weights), rule)
    found = []
    for weight in weights:
        rows, columns = weight.shape
        packed = np.empty((rows, columns // 2), dtype=np.uint8)
        block_scale = np.empty((rows, columns // BLOCK_SIZE), dtype=np.uint8)
        fast_cpu.encode_into(weight, "F32", rule, scale, packed, block_scale)
        decoded = np.empty((rows, columns), dtype=np.float32)
        fast_cpu.decode_into(packed, fast_cpu.effective_scale(block_scale, scale), decoded)
        found.append(decoded)
    return found


def _sharing(tensors: Sequence[SourceTensor]) -> list[list[SourceTensor]]:
    """Weights that share one tensor scale."""
    found: dict[str, list[SourceTensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.spec.scale_group or tensor.spec.name, []).append(tensor)
    return list(found.values())
