"""Units of work that look at inputs: weighted scales, GPTQ and its like, folds, input scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.branch import BRANCH_DOWN_SUFFIX, BRANCH_UP_SUFFIX
from omnifp4.checkpoint.dialects import Activations, Dialect
from omnifp4.checkpoint.folds import Fold, Folds, scaled
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.output import OutputWriter
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError, RecipeError
from omnifp4.formats import fast_cpu
from omnifp4.formats.nvfp4 import E2M1_MAX, E4M3_MAX, Float32Array
from omnifp4.formats.scheme import Scheme
from omnifp4.formats.widening import narrow, widen
from omnifp4.models.base import Kind
from omnifp4.models.source import SourceTensor
from omnifp4.quantization.decisions import EncodeUnit, FusedUnit, Job
from omnifp4.quantization.inputs import KnownInputs
from omnifp4.quantization.method import Auto, Nearest, Weighting
from omnifp4.quantization.work import Worker

if TYPE_CHECKING:
    from torch import Tensor

    from omnifp4.quantization.rounding import Subject

FOLD_UNIT: Final = "fold:"
"""In the journal, before the name of a fold's origin."""

IDLE_AMAX: Final = 1.0
"""Largest input that is taken of a linear whose inputs were all zero."""


class CalibratedWorker(Worker):
    """See `Worker`. What is known of the inputs changes from layer to layer: `inputs`; folds are added as they are found.

    Attributes:
        inputs: of the layer at hand, or of a statistics file; None: nothing is known.
        folds: all so far.
    """

    def __init__(self, reader: CheckpointReader, writer: OutputWriter, job: Job) -> None:
        super().__init__(reader, writer, job.rule, job.output_format)
        self._recipe = job.recipe
        self._plain = isinstance(job.recipe.method, Nearest | Auto) and job.recipe.weighting is Weighting.NONE
        self._siblings = _siblings(job)
        self.inputs: KnownInputs | None = None
        self.folds = Folds()

    @property
    def reader(self) -> CheckpointReader:
        """Of the wide checkpoint."""
        return self._reader

    def take_fold(self, record: Mapping[str, Any]) -> None:
        """Take a fold from the journal."""
        if record.get("fold") is not None:
            self.folds.add(Fold.from_json(record["fold"]))

    def _copy(self, entry: TensorEntry) -> int:
        exponents = self.folds.exponents(entry.name, entry.shape)
        if exponents is None:
            return super()._copy(entry)
        raw = self._reader.read(entry)
        self._check_finite(entry, raw.reshape(-1).view(np.uint8), 0)
        values = scaled(widen(raw, entry.dtype), exponents)
        return self._writer.write(entry.name, narrow(values, entry.dtype))

    def _encode(self, unit: EncodeUnit) -> dict[str, Any]:
        if unit.scheme is not Scheme.NVFP4:
            return super()._encode(unit)
        names = [tensor.spec.name for tensor in unit.tensors]
        record = self._encode_whole(unit) if self._needs_whole(names) else super()._encode(unit)
        dialect = self._format.dialect
        if dialect is not None and self._recipe.activations is Activations.FP4:
            scale = self._input_scale(names, record)
            for tensor in unit.tensors:
                name = tensor.spec.module + dialect.input_scale_suffix
                stored = np.float32(1.0) / scale if dialect.reciprocal else scale
                record["crc"][name] = self._writer.write(name, np.array([stored], dtype="<f4"))
        record["sources"] = {name: self._source(name) for name in names}
        return record

    def _needs_whole(self, names: Sequence[str]) -> bool:
        if any(name in self.folds for name in names):
            return True
        return not self._plain and (bool(self._recipe.rank) or any(self._source(name) != "none" for name in names))

    def _source(self, name: str) -> str:
        return self.inputs.source(name) if self.inputs is not None else "none"

    def _encode_whole(self, unit: EncodeUnit) -> dict[str, Any]:
        record: dict[str, Any] = {"crc": {}, "errors": {}, "outputs": {}, "damping": {}}
        scale, parts = self._round(unit.tensors, record)
        dialect = self._format.dialect
        for tensor, (packed, block_scale, values, branch) in zip(unit.tensors, parts, strict=True):
            crc, module = record["crc"], tensor.spec.module
            if dialect is None:
                name = tensor.spec.name
                crc[name] = self._writer.write(name, narrow(_on_host(values), tensor.entry.dtype))
                continue
            self._write_codes(dialect, module, packed, block_scale, scale, crc)
            for suffix, half in zip((BRANCH_UP_SUFFIX, BRANCH_DOWN_SUFFIX), branch or (), strict=False):
                crc[module + suffix] = self._writer.write(module + suffix, np.ascontiguousarray(half))
        return record

    def _write_codes(
        self,
        dialect: Dialect,
        module: str,
        packed: npt.NDArray[np.uint8],
        block_scale: npt.NDArray[np.uint8],
        scale: np.float32,
        crc: dict[str, int],
    ) -> None:
        stored = np.float32(1.0) / scale if dialect.reciprocal else scale
        for suffix, values in (
            (dialect.packed_suffix, packed),
            (dialect.block_scale_suffix, block_scale),
            (dialect.tensor_scale_suffix, np.array([stored], dtype="<f4")),
        ):
            crc[module + suffix] = self._writer.write(module + suffix, values)

    def _round_fused(self, unit: FusedUnit) -> dict[str, Any]:
        names = [tensor.spec.name for tensors in unit.experts for tensor in tensors]
        if unit.scheme is not Scheme.NVFP4 or not self._needs_whole(names):
            record = super()._round_fused(unit)
        else:
            record = {"crc": {}, "errors": {}, "outputs": {}, "damping": {}}
            crc = position = 0
            for tensors in unit.experts:
                _, parts = self._round(tensors, record)
                expert = np.concatenate([narrow(_on_host(values), tensors[0].entry.dtype) for _, _, values, _ in parts])
                if not tensors[0].rows_divide:
                    expert = np.ascontiguousarray(expert.T)
                crc = self._writer.write(unit.entry.name, expert, position, crc)
                position += expert.nbytes
            record["crc"][unit.entry.name] = crc
        record["sources"] = {name: self._source(name) for name in names}
        return record

    def _round(
        self, tensors: Sequence[SourceTensor], record: dict[str, Any]
    ) -> tuple[np.float32, list[tuple[Any, Any, Tensor, Any]]]:
        from omnifp4.quantization.rounding import round_group

        subjects = self.subjects(tensors)
        try:
            scale, rounded = round_group(subjects, self._recipe, self._rule, self.inputs)
        except ValueError as error:
            entry = tensors[0].entry
            raise CheckpointError(
                f"{self._reader.checkpoint.location}/{entry.shard}: tensor {tensors[0].spec.name!r}: {error}"
            ) from None
        parts = []
        for subject, done in zip(subjects, rounded, strict=True):
            record["errors"][subject.name] = [done.stats.squared_error, done.stats.energy]
            if done.output is not None and self.inputs is not None:
                tokens = self.inputs.tokens(subject.name)
                record["outputs"][subject.name] = [tokens * part for part in done.output]
            if self.inputs is not None and self.inputs.learned(subject.name) is not None:
                record["learned"] = record.get("learned", 0) + 1
            if done.damping is not None:
                record["damping"][subject.name] = done.damping if np.isfinite(done.damping) else None
            parts.append((done.packed, done.block_scale, done.values, done.branch))
        return scale, parts

    def subjects(self, tensors: Sequence[SourceTensor]) -> list[Subject]:
        """Weights as they are rounded.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        from omnifp4.quantization.rounding import Subject

        found = []
        for tensor in tensors:
            raw = tensor.read(self._reader)
            scan = fast_cpu.scan(raw, tensor.entry.dtype)
            if scan.nonfinite_index >= 0:
                raise self._not_finite(tensor.spec.name, tensor.entry, scan.nonfinite_index)
            found.append(self._folded(tensor, widen(raw, tensor.entry.dtype), Subject))
        return found

    def _folded(self, tensor: SourceTensor, wide: Float32Array, kind: type[Any]) -> Any:
        name = tensor.spec.name
        columns, rows = self.folds.columns(name), self.folds.outputs(name)
        values = scaled(wide, self.folds.exponents(name, tensor.spec.shape))
        return kind(
            name,
            np.ascontiguousarray(values),
            None if columns is None else np.exp2(columns.astype(np.float32)),
            None if rows is None else np.exp2(rows.astype(np.float32)),
        )

    def _input_scale(self, names: Sequence[str], record: dict[str, Any]) -> np.float32:
        """``amax / (6 * 448)`` of linears that read the same input; of an expert that saw too little, of its siblings."""
        amax = self._input_amax(names)
        if amax is None:
            amax = self._input_amax([name for own in names for name in self._siblings.get(_expert_part(own), ())])
            record["input_scale_of_siblings"] = list(names)
        if amax is None:
            raise RecipeError(
                f"{names[0]}: nothing is known of its inputs, and W4A4 needs an input scale for every linear",
                hint="calibrate with statistics of this component, or leave it wide with --component NAME=bf16",
            )
        return np.float32(amax or IDLE_AMAX) / np.float32(E2M1_MAX * E4M3_MAX)

    def _input_amax(self, names: Sequence[str]) -> float | None:
        if self.inputs is None:
            return None
        known = [name for name in names if self.inputs.source(name) != "none"]
        return max((float(self.inputs.statistics(name).amax) for name in known), default=None)


def _on_host(values: Tensor) -> Float32Array:
    found: Float32Array = values.cpu().numpy()
    return found


def _expert_part(name: str) -> str:
    """The same for all experts of a layer."""
    prefix, _, rest = name.rpartition(".experts.")
    return f"{prefix}.experts.{rest.partition('.')[2]}"


def _siblings(job: Job) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for decision in job.quantized:
        if decision.spec.component.kind is Kind.EXPERTS:
            found.setdefault(_expert_part(decision.spec.name), []).append(decision.spec.name)
    return found
