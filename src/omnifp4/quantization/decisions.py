"""What happens to every tensor, decided from headers alone; and where its bytes will stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from omnifp4.checkpoint.dialects import DIALECTS, Activations, Dialect, StoredTensor
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.output import DEFAULT_SHARD_BYTES, PlannedOutput, plan_output
from omnifp4.errors import RecipeError
from omnifp4.formats.nvfp4 import BLOCK_SIZE, ScaleRule
from omnifp4.models.base import Component, TensorSpec
from omnifp4.models.source import Source, SourceTensor
from omnifp4.quantization.recipe import NVFP4, Recipe, choose_schemes

WIDE_UNIT_BYTES: Final = 16 << 20
"""Small untouched tensors are copied together, up to this many bytes."""


class OutputFormat(StrEnum):
    """What is written."""

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed-tensors"
    FAKE_QUANT = "fake-quant"
    """Wide weights rounded through NVFP4: for quality checks, nothing shrinks."""

    @property
    def dialect(self) -> Dialect | None:
        """How FP4 linears stand on disk; None where weights stay wide."""
        return DIALECTS.get(self.value)


def find_format(name: str) -> OutputFormat:
    """The output format of that name; raises RecipeError that lists the known ones."""
    try:
        return OutputFormat(name)
    except ValueError:
        raise RecipeError(f"format {name!r} is unknown; known are {', '.join(OutputFormat)}") from None


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one tensor.

    Attributes:
        tensor: the logical tensor and its bytes.
        quantize: it becomes NVFP4.
        reason: why it stays wide; empty if it is quantized.
    """

    tensor: SourceTensor
    quantize: bool
    reason: str = ""

    @property
    def spec(self) -> TensorSpec:
        return self.tensor.spec


@dataclass(frozen=True)
class EncodeUnit:
    """Linears that share one tensor scale: the smallest piece of work, done and recorded as a whole."""

    name: str
    tensors: tuple[SourceTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class FusedUnit:
    """A 3-D tensor that keeps its form, whose experts are rounded one after another.

    Attributes:
        name: of the unit.
        entry: the tensor on disk.
        experts: for each expert its linears, in order along the output dimension; they share one tensor scale.
    """

    name: str
    entry: TensorEntry
    experts: tuple[tuple[SourceTensor, ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return self.entry.nbytes


@dataclass(frozen=True)
class CopyUnit:
    """Tensors on disk that are copied bit by bit."""

    name: str
    entries: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(entry.nbytes for entry in self.entries)


Unit = EncodeUnit | FusedUnit | CopyUnit


@dataclass(frozen=True)
class Job:
    """Everything that decides the bytes that are written.

    Attributes:
        source: the wide checkpoint.
        recipe: as chosen.
        rule: the recipe's scale rule, or another that was asked for.
        overrides: as asked for.
        output_format: what is written.
        schemes: of every component.
        decisions: of every tensor, in layout order.
        units: the work, in the order of the output.
        output: shard files to be written.
    """

    source: Source
    recipe: Recipe
    rule: ScaleRule
    overrides: Mapping[str, str]
    output_format: OutputFormat
    schemes: Mapping[Component, str]
    decisions: tuple[Decision, ...]
    units: tuple[Unit, ...]
    output: PlannedOutput

    @property
    def quantized(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.quantize]

    def ignore(self) -> list[str]:
        """Entries for the config: all linears that stay wide, in the dialect's words."""
        dialect = self.output_format.dialect
        if dialect is None:
            return []
        wide = [d.spec.module for d in self.decisions if d.spec.is_linear and not d.quantize]
        return dialect.ignore_entries(wide, [decision.spec.module for decision in self.quantized])


def decide(
    source: Source,
    recipe: Recipe,
    *,
    rule: ScaleRule | None = None,
    overrides: Mapping[str, str] | None = None,
    output_format: OutputFormat = OutputFormat.MODELOPT,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Job:
    """Decide everything.

    Raises:
        RecipeError: recipe and model do not fit, no linear is left to quantize, or the result would not be smaller.
    """
    schemes = choose_schemes(source.layout, recipe, overrides or {})
    decisions = tuple(_decide_tensor(tensor, schemes, recipe) for tensor in source.tensors)
    units = _units(source, decisions, keep_fused=output_format.dialect is None)
    stored = (_stored(unit, output_format) for unit in units)
    groups = (group for unit_groups in stored for group in unit_groups)
    job = Job(
        source=source,
        recipe=recipe,
        rule=rule or recipe.rule,
        overrides=dict(overrides or {}),
        output_format=output_format,
        schemes=schemes,
        decisions=decisions,
        units=units,
        output=plan_output(groups, max_shard_bytes),
    )
    _refuse_futile(job)
    return job


def _refuse_futile(job: Job) -> None:
    """A run that quantizes nothing, or whose files are no smaller, must not end as a success."""
    model_type, source = job.source.layout.model_type, job.source.checkpoint
    if not job.quantized:
        reasons = ", ".join(dict.fromkeys(d.reason for d in job.decisions if d.spec.is_linear))
        raise RecipeError(
            f"recipe {job.recipe.name!r} with these components leaves nothing of this {model_type} to quantize: {reasons}"
        )
    if job.output_format.dialect and job.output.weight_bytes >= source.weight_bytes:
        raise RecipeError(
            f"{source.location}: would not shrink: {job.output.weight_bytes:,} bytes of weights after "
            f"{source.weight_bytes:,} before, because {len(job.quantized)} quantized linear(s) save less than their scales "
            "and names take"
        )


def _decide_tensor(tensor: SourceTensor, schemes: Mapping[Component, str], recipe: Recipe) -> Decision:
    spec = tensor.spec
    if schemes[spec.component] != NVFP4:
        return Decision(tensor, False, spec.component.why_wide or f"not part of recipe {recipe.name}")
    if not spec.is_linear:
        return Decision(tensor, False, "not the weight of a linear layer")
    if spec.shape[1] % BLOCK_SIZE:
        return Decision(tensor, False, f"width {spec.shape[1]} is not a multiple of {BLOCK_SIZE}")
    return Decision(tensor, True)


def _units(source: Source, decisions: tuple[Decision, ...], *, keep_fused: bool) -> tuple[Unit, ...]:
    """The work in layout order. `keep_fused`: what is rounded and stays wide keeps the form that loaders know."""
    units: list[Unit] = []
    grouped: dict[str, list[SourceTensor]] = {}
    fused: dict[str, list[SourceTensor]] = {}
    for decision in decisions:
        if decision.quantize and keep_fused and decision.tensor.fused:
            fused.setdefault(decision.tensor.entry.name, []).append(decision.tensor)
        elif decision.quantize:
            grouped.setdefault(decision.spec.scale_group or decision.spec.name, []).append(decision.tensor)
    waiting: list[TensorEntry] = []
    copied: set[str] = set()

    def flush() -> None:
        if waiting:
            units.append(CopyUnit(f"copy:{waiting[0].name}", tuple(waiting)))
            waiting.clear()

    for decision in decisions:
        key = decision.spec.scale_group or decision.spec.name
        if decision.quantize and decision.tensor.entry.name in fused:
            flush()
            units.append(_fused_unit(fused.pop(decision.tensor.entry.name)))
        elif decision.quantize and key in grouped:
            flush()
            units.append(EncodeUnit(f"encode:{key}", tuple(grouped.pop(key))))
        elif not decision.quantize and decision.tensor.entry.name not in copied:
            copied.add(decision.tensor.entry.name)
            if sum(entry.nbytes for entry in waiting) + decision.tensor.entry.nbytes > WIDE_UNIT_BYTES:
                flush()
            waiting.append(decision.tensor.entry)
    waiting.extend(source.buffers)
    flush()
    return tuple(units)


def _fused_unit(tensors: list[SourceTensor]) -> FusedUnit:
    experts: dict[int, list[SourceTensor]] = {}
    for tensor in tensors:
        assert tensor.fused is not None
        experts.setdefault(tensor.fused.expert, []).append(tensor)
    entry = tensors[0].entry
    return FusedUnit(f"encode:{entry.name}", entry, tuple(tuple(experts[number]) for number in sorted(experts)))


def _stored(unit: Unit, output_format: OutputFormat) -> list[list[StoredTensor]]:
    if isinstance(unit, CopyUnit):
        return [[StoredTensor(entry.name, entry.dtype, entry.shape)] for entry in unit.entries]
    if isinstance(unit, FusedUnit):
        return [[StoredTensor(unit.entry.name, unit.entry.dtype, unit.entry.shape)]]
    return [list(stored_tensors(tensor, output_format)) for tensor in unit.tensors]


def stored_tensors(tensor: SourceTensor, output_format: OutputFormat) -> tuple[StoredTensor, ...]:
    """The tensors that a quantized linear becomes: codes, block scale, tensor scale; or one wide tensor."""
    rows, columns = tensor.spec.shape
    if (dialect := output_format.dialect) is None:
        return (StoredTensor(tensor.spec.name, tensor.entry.dtype, (rows, columns)),)
    return dialect.stored(tensor.spec.module, (rows, columns), Activations.WIDE)
