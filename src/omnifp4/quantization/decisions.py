"""What happens to every tensor, decided from headers alone; and where its bytes will stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from omnifp4.checkpoint.branch import BRANCH_DOWN_SUFFIX, BRANCH_UP_SUFFIX
from omnifp4.checkpoint.dialects import DIALECTS, Activations, Dialect, StoredTensor
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.output import DEFAULT_SHARD_BYTES, PlannedOutput, plan_output
from omnifp4.errors import RecipeError
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.formats.scheme import Scheme
from omnifp4.models.base import Component, Kind, Part, TensorSpec
from omnifp4.models.source import Source, SourceTensor
from omnifp4.quantization.method import Auto, Nearest, Need
from omnifp4.quantization.recipe import Recipe, choose_schemes

WIDE_UNIT_BYTES: Final = 16 << 20
"""Small untouched tensors are copied together, up to this many bytes."""


class OutputFormat(StrEnum):
    """What is written."""

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed-tensors"
    FAKE_QUANT = "fake-quant"
    """Wide weights rounded through their schemes: for quality checks, nothing shrinks."""

    @property
    def dialect(self) -> Dialect | None:
        """How quantized linears stand on disk; None where weights stay wide."""
        return DIALECTS.get(self.value)


def find_format(name: str) -> OutputFormat:
    """The output format of that name; raises RecipeError that lists the known ones."""
    try:
        return OutputFormat(name)
    except ValueError:
        raise RecipeError(f"format {name!r} is unknown; known are {', '.join(OutputFormat)}") from None


@dataclass(frozen=True, slots=True)
class Extras:
    """What is stored beside codes and weight scales of an NVFP4 linear.

    Attributes:
        activations: W4A4 has an input scale.
        rank: of the low-rank branch; 0: there is none.
    """

    activations: Activations = Activations.WIDE
    rank: int = 0


NO_EXTRAS: Final = Extras()


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one tensor.

    Attributes:
        tensor: the logical tensor and its bytes.
        scheme: what it becomes.
        reason: why it stays wide; empty if it is quantized.
    """

    tensor: SourceTensor
    scheme: Scheme
    reason: str = ""

    @property
    def quantize(self) -> bool:
        """Whether it is rounded at all."""
        return not self.scheme.is_wide

    @property
    def spec(self) -> TensorSpec:
        return self.tensor.spec


@dataclass(frozen=True)
class EncodeUnit:
    """Linears of one scheme that share one tensor scale: the smallest piece of work, done and recorded as a whole."""

    name: str
    scheme: Scheme
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
        scheme: through which they are rounded.
        entry: the tensor on disk.
        experts: for each expert its linears, in order along the output dimension; they share one tensor scale.
    """

    name: str
    scheme: Scheme
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
    overrides: Mapping[str, Scheme]
    output_format: OutputFormat
    schemes: Mapping[Component, Scheme]
    decisions: tuple[Decision, ...]
    units: tuple[Unit, ...]
    output: PlannedOutput

    @property
    def rule_name(self) -> str:
        """As ``--rule`` takes it."""
        return self.recipe.rule_name if self.rule is self.recipe.rule else self.rule.value

    @property
    def extras(self) -> Extras:
        """Beside each NVFP4 linear."""
        return extras_of(self.recipe)

    @property
    def quantized(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.quantize]

    def module_schemes(self) -> dict[str, Scheme]:
        """The scheme of every quantized linear, by module, in layout order."""
        return {decision.spec.module: decision.scheme for decision in self.quantized}

    def ignore(self) -> list[str]:
        """Entries for the config: all linears that stay wide, in the dialect's words."""
        dialect = self.output_format.dialect
        if dialect is None:
            return []
        wide = [d.spec.module for d in self.decisions if d.spec.is_linear and not d.quantize]
        return dialect.ignore_entries(wide, [decision.spec.module for decision in self.quantized])


def extras_of(recipe: Recipe) -> Extras:
    """What a recipe stores beside each NVFP4 linear."""
    return Extras(recipe.activations, recipe.rank)


def decide(
    source: Source,
    recipe: Recipe,
    *,
    rule: ScaleRule | None = None,
    overrides: Mapping[str, Scheme] | None = None,
    assigned: Mapping[str, Scheme] | None = None,
    output_format: OutputFormat = OutputFormat.MODELOPT,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Job:
    """Decide everything.

    Args:
        source: the wide checkpoint.
        recipe: what is asked for.
        rule: another scale rule than the recipe's.
        overrides: scheme by component or part.
        output_format: what is written.
        max_shard_bytes: largest shard file.
        assigned: scheme of single weights, by name, where a budget chose; all of a scale group alike.

    Raises:
        RecipeError: recipe and model do not fit, no linear is left to quantize, the result would not be smaller, or the
            format cannot hold what the recipe makes.
    """
    if recipe.rank and output_format is OutputFormat.COMPRESSED_TENSORS:
        raise RecipeError(
            f"format {output_format} cannot hold the low-rank branch of recipe {recipe.name!r}",
            hint="choose --format modelopt or fake-quant",
        )
    schemes = choose_schemes(source.layout, recipe, overrides or {})
    decisions = tuple(_decide_tensor(tensor, schemes, recipe, assigned or {}) for tensor in source.tensors)
    if output_format.dialect is not None:
        _refuse_split_experts(decisions, schemes)
        _refuse_mixed_branches(decisions, recipe, output_format)
    units = _units(source, decisions, keep_fused=output_format.dialect is None)
    stored = (_stored(unit, output_format, extras_of(recipe)) for unit in units)
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
    _refuse_idle_method(job)
    return job


def _refuse_split_experts(decisions: tuple[Decision, ...], schemes: Mapping[Component, Scheme]) -> None:
    """Engines build the experts of a layer as one, so a scheme that holds only some of their widths is none for them."""
    for decision in decisions:
        spec, scheme = decision.spec, schemes[decision.spec.component]
        if spec.component.kind is not Kind.EXPERTS or not spec.is_linear or scheme in (Scheme.NVFP4, Scheme.WIDE):
            continue
        if spec.shape[1] % scheme.width_multiple:
            raise RecipeError(
                f"component {spec.component.name!r} cannot be {scheme}: the width {spec.shape[1]} of {spec.name} is not a "
                f"multiple of {scheme.width_multiple}, and engines build experts as one",
                hint=f"--component {spec.component.name}=fp8 has no such limit",
            )


def _refuse_mixed_branches(decisions: tuple[Decision, ...], recipe: Recipe, output_format: OutputFormat) -> None:
    """Where layers are named one by one, engines take one of an algorithm that they do not know for a wide one."""
    for decision in decisions:
        if recipe.rank and decision.quantize and decision.scheme is not Scheme.NVFP4:
            component = decision.spec.component.name
            raise RecipeError(
                f"format {output_format} cannot hold the low-rank branches of recipe {recipe.name!r} beside {component} in "
                f"{decision.scheme}",
                hint=f"--component {component}=bf16, or --format fake-quant",
            )


def _refuse_idle_method(job: Job) -> None:
    """A way of rounding that nothing is rounded by must not stand in the receipt."""
    recipe = job.recipe
    if recipe.need is Need.NOTHING or isinstance(recipe.method, Auto):
        return
    seen = [decision for decision in job.quantized if decision.scheme is Scheme.NVFP4]
    where = ""
    if recipe.need is Need.HESSIANS:
        seen, where = [one for one in seen if one.spec.component.part is Part.THINKER], " of the thinker"
    if not seen:
        how = recipe.rule_name if isinstance(recipe.method, Nearest) else recipe.method.name
        how = recipe.activations.value if recipe.activations is Activations.FP4 else how
        raise RecipeError(
            f"recipe {recipe.name!r} does {how} to linears{where} in nvfp4, and with these components there are none",
            hint="leave a component in nvfp4, or choose a recipe that looks at no inputs",
        )


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


def _decide_tensor(
    tensor: SourceTensor, schemes: Mapping[Component, Scheme], recipe: Recipe, assigned: Mapping[str, Scheme]
) -> Decision:
    spec = tensor.spec
    scheme = assigned.get(spec.name, schemes[spec.component])
    if scheme.is_wide and spec.name in assigned:
        return Decision(tensor, Scheme.WIDE, "the budget of bits was better spent here")
    if scheme.is_wide:
        return Decision(tensor, Scheme.WIDE, spec.component.why_wide or f"not part of recipe {recipe.name}")
    if not spec.is_linear:
        return Decision(tensor, Scheme.WIDE, "not the weight of a linear layer")
    if spec.shape[1] % scheme.width_multiple:
        return Decision(tensor, Scheme.WIDE, f"width {spec.shape[1]} is not a multiple of {scheme.width_multiple}")
    return Decision(tensor, scheme)


def _units(source: Source, decisions: tuple[Decision, ...], *, keep_fused: bool) -> tuple[Unit, ...]:
    """The work in layout order. `keep_fused`: what is rounded and stays wide keeps the form that loaders know."""
    units: list[Unit] = []
    grouped: dict[str, list[SourceTensor]] = {}
    fused: dict[str, list[SourceTensor]] = {}
    for decision in decisions:
        if decision.quantize and keep_fused and decision.tensor.fused:
            # Experts of one 3-D tensor are of one component, and so of one scheme.
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
            units.append(_fused_unit(fused.pop(decision.tensor.entry.name), decision.scheme))
        elif decision.quantize and key in grouped:
            flush()
            units.append(EncodeUnit(f"encode:{key}", decision.scheme, tuple(grouped.pop(key))))
        elif not decision.quantize and decision.tensor.entry.name not in copied:
            copied.add(decision.tensor.entry.name)
            if sum(entry.nbytes for entry in waiting) + decision.tensor.entry.nbytes > WIDE_UNIT_BYTES:
                flush()
            waiting.append(decision.tensor.entry)
    waiting.extend(source.buffers)
    flush()
    return tuple(units)


def _fused_unit(tensors: list[SourceTensor], scheme: Scheme) -> FusedUnit:
    experts: dict[int, list[SourceTensor]] = {}
    for tensor in tensors:
        assert tensor.fused is not None
        experts.setdefault(tensor.fused.expert, []).append(tensor)
    entry = tensors[0].entry
    return FusedUnit(f"encode:{entry.name}", scheme, entry, tuple(tuple(experts[number]) for number in sorted(experts)))


def _stored(unit: Unit, output_format: OutputFormat, extras: Extras) -> list[list[StoredTensor]]:
    if isinstance(unit, CopyUnit):
        return [[StoredTensor(entry.name, entry.dtype, entry.shape)] for entry in unit.entries]
    if isinstance(unit, FusedUnit):
        return [[StoredTensor(unit.entry.name, unit.entry.dtype, unit.entry.shape)]]
    return [list(stored_tensors(tensor, unit.scheme, output_format, extras)) for tensor in unit.tensors]


def stored_tensors(
    tensor: SourceTensor, scheme: Scheme, output_format: OutputFormat, extras: Extras = NO_EXTRAS
) -> tuple[StoredTensor, ...]:
    """The tensors that a quantized linear becomes: codes and scales; or one wide tensor."""
    rows, columns = tensor.spec.shape
    if (dialect := output_format.dialect) is None:
        return (StoredTensor(tensor.spec.name, tensor.entry.dtype, (rows, columns)),)
    module = tensor.spec.module
    stored = dialect.stored(module, (rows, columns), extras.activations, scheme)
    if scheme is Scheme.NVFP4 and extras.rank:
        rank = min(extras.rank, rows, columns)
        stored += (
            StoredTensor(module + BRANCH_UP_SUFFIX, "BF16", (rows, rank)),
            StoredTensor(module + BRANCH_DOWN_SUFFIX, "BF16", (rank, columns)),
        )
    return stored
