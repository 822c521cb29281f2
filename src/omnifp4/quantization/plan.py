"""The plan: what `quantize` would do and write, told from headers alone, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omnifp4.checkpoint.dtypes import byte_count
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.output import DEFAULT_SHARD_BYTES
from omnifp4.checkpoint.side_files import side_file_bytes
from omnifp4.checkpoint.staging import free_bytes
from omnifp4.errors import RecipeError
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.formats.scheme import Scheme
from omnifp4.models.base import Component
from omnifp4.models.source import match_source
from omnifp4.quantization.budget import Progress, assign
from omnifp4.quantization.decisions import Decision, Job, OutputFormat, decide, stored_tensors
from omnifp4.quantization.method import Need
from omnifp4.quantization.recipe import DEFAULT_RECIPE, Recipe, find_recipe
from omnifp4.receipt.base import as_text, this_environment
from omnifp4.receipt.plan import ComponentRow, PlanReceipt

if TYPE_CHECKING:
    from omnifp4.calibration.statistics import Statistics
    from omnifp4.receipt.sensitivity import SensitivityReceipt


def plan_job(
    checkpoint: Checkpoint,
    *,
    recipe: str | Recipe = DEFAULT_RECIPE,
    rule: ScaleRule | None = None,
    overrides: Mapping[str, Scheme] | None = None,
    output_format: OutputFormat = OutputFormat.MODELOPT,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    statistics: Statistics | None = None,
    sensitivity: SensitivityReceipt | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> Job:
    """Match a checkpoint to its layout and decide everything.

    Args:
        checkpoint: the wide one.
        recipe: or its name.
        rule: another scale rule than the recipe's.
        overrides: scheme by component or part.
        output_format: what is written.
        max_shard_bytes: largest shard file.
        statistics: of the inputs, for a recipe that chooses formats under a budget; without them it is taken that all
            weights hurt alike, which fills the same budget.
        sensitivity: map of an artifact of this checkpoint, for such a recipe that chooses by divergence.
        threads, progress: of the measurement that these statistics make possible.

    Raises:
        OmniFP4Error: the checkpoint, its model_type, the recipe or an override is not right.
    """
    source = match_source(checkpoint)
    chosen = find_recipe(recipe) if isinstance(recipe, str) else recipe
    if statistics is not None and chosen.need is Need.NOTHING:
        raise RecipeError(
            f"recipe {chosen.name!r} looks at no inputs, so statistics and data have no use",
            hint="leave them out, or choose --rule importance or another recipe",
        )
    return decide(
        source,
        chosen,
        rule=rule,
        overrides=overrides,
        assigned=assign(
            source,
            chosen,
            overrides or {},
            output_format,
            statistics,
            sensitivity=sensitivity,
            threads=threads,
            progress=progress,
        ),
        output_format=output_format,
        max_shard_bytes=max_shard_bytes,
    )


def plan_receipt(job: Job, out: Path | None = None) -> PlanReceipt:
    """The record of a plan; `out` is where the artifact would be made, for the free space there."""
    checkpoint = job.source.checkpoint
    rows = component_rows(job)
    parameters = sum(row.parameters for row in rows)
    fp4 = sum(row.fp4_parameters for row in rows)
    return PlanReceipt(
        model=as_text(checkpoint.location),
        model_type=job.source.layout.model_type,
        recipe=job.recipe.name,
        recipe_version=job.recipe.version,
        rule=job.rule_name,
        overrides=dict(job.overrides),
        output_format=job.output_format.value,
        components=rows,
        tensors=len(checkpoint.tensors),
        parameters=parameters,
        fp4_parameters=fp4,
        fp4_share=fp4 / parameters,
        weight_bytes_before=checkpoint.weight_bytes,
        weight_bytes_after=job.output.weight_bytes,
        gpu_bytes=job.output.tensor_bytes,
        shards={shard.file_name: shard.total_bytes for shard in job.output.shards},
        side_file_bytes=side_file_bytes(checkpoint.folder) if checkpoint.folder else None,
        free_disk_bytes=free_bytes(out) if out else None,
        left_out=left_out(job),
        notes=_notes(job),
        environment=this_environment(),
    )


def left_out(job: Job) -> dict[str, str]:
    """Linears of a quantized component that stay wide, with the reason."""
    return {
        decision.spec.name: decision.reason
        for decision in job.decisions
        if decision.spec.is_linear and not decision.quantize and not job.schemes[decision.spec.component].is_wide
    }


def component_rows(job: Job) -> tuple[ComponentRow, ...]:
    """One row per component, in layout order."""
    members: dict[Component, list[Decision]] = {}
    for decision in job.decisions:
        members.setdefault(decision.spec.component, []).append(decision)
    return tuple(_row(job, component, decisions) for component, decisions in members.items())


def _row(job: Job, component: Component, decisions: list[Decision]) -> ComponentRow:
    wide_bytes = [byte_count(d.tensor.entry.dtype, d.spec.shape) for d in decisions]
    after = 0
    for decision, wide in zip(decisions, wide_bytes, strict=True):
        if decision.quantize:
            stored = stored_tensors(decision.tensor, decision.scheme, job.output_format, job.extras)
            after += sum(byte_count(s.dtype, s.shape) for s in stored)
        else:
            after += wide
    reasons = dict.fromkeys(decision.reason for decision in decisions if not decision.quantize)
    fp4 = [decision for decision in decisions if decision.scheme.code_bits == 4]
    return ComponentRow(
        name=component.name,
        scheme=job.schemes[component],
        tensors=len(decisions),
        parameters=sum(decision.spec.parameters for decision in decisions),
        fp4_parameters=sum(decision.spec.parameters for decision in fp4),
        quantized_parameters=sum(decision.spec.parameters for decision in decisions if decision.quantize),
        bytes_before=sum(wide_bytes),
        bytes_after=after,
        reason="; ".join(reasons),
    )


def _notes(job: Job) -> tuple[str, ...]:
    notes = list(job.source.layout.notes)
    if job.output_format is OutputFormat.FAKE_QUANT:
        notes.append(
            "fake-quant: weights are rounded through their schemes and stay wide; nothing shrinks, it is for quality checks"
        )
    for component, scheme in job.schemes.items():
        if not scheme.is_wide and component.why_wide:
            notes.append(f"{component.name} becomes {scheme} though no default recipe does that: {component.why_wide}")
    if job.output_format is OutputFormat.MODELOPT:
        notes += _modelopt_notes(job)
    if job.output_format.dialect and any(decision.tensor.fused for decision in job.quantized):
        notes.append("experts are stored in fused 3-D tensors; quantized ones are written one tensor per expert")
    return tuple(notes)


def _modelopt_notes(job: Job) -> list[str]:
    """What engines do with the forms that the ModelOpt dialect has for schemes beside NVFP4."""
    notes = []
    coded = [decision for decision in job.quantized if decision.scheme is not Scheme.NVFP4]
    if any(d.scheme is Scheme.FP8 and ".experts." in d.spec.module for d in coded):
        notes.append("modelopt: vLLM up to 0.32 has no experts in fp8 with scales per channel; compressed-tensors has")
    if any(d.scheme is Scheme.MXFP4 for d in coded):
        notes.append("modelopt: vLLM up to 0.32 does not read mxfp4 from this dialect; it does from compressed-tensors")
    return notes
