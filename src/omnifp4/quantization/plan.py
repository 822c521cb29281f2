"""The plan: what `quantize` would do and write, told from headers alone, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omnifp4.checkpoint.dtypes import byte_count
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.output import DEFAULT_SHARD_BYTES
from omnifp4.checkpoint.side_files import side_file_bytes
from omnifp4.checkpoint.staging import free_bytes
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.models.base import Component
from omnifp4.models.source import match_source
from omnifp4.quantization.decisions import Decision, Job, OutputFormat, decide, stored_tensors
from omnifp4.quantization.recipe import DEFAULT_RECIPE, NVFP4, find_recipe
from omnifp4.receipt.base import as_text, this_environment
from omnifp4.receipt.plan import ComponentRow, PlanReceipt


def plan_job(
    checkpoint: Checkpoint,
    *,
    recipe: str = DEFAULT_RECIPE,
    rule: ScaleRule | None = None,
    overrides: Mapping[str, str] | None = None,
    output_format: OutputFormat = OutputFormat.MODELOPT,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Job:
    """Match a checkpoint to its layout and decide everything.

    Raises:
        OmniFP4Error: the checkpoint, its model_type, the recipe or an override is not right.
    """
    return decide(
        match_source(checkpoint),
        find_recipe(recipe),
        rule=rule,
        overrides=overrides,
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
        rule=job.rule.value,
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
        if decision.spec.is_linear and not decision.quantize and job.schemes[decision.spec.component] == NVFP4
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
            after += sum(byte_count(s.dtype, s.shape) for s in stored_tensors(decision.tensor, job.output_format))
        else:
            after += wide
    reasons = dict.fromkeys(decision.reason for decision in decisions if not decision.quantize)
    fp4 = [decision for decision in decisions if decision.quantize]
    return ComponentRow(
        name=component.name,
        scheme=job.schemes[component],
        tensors=len(decisions),
        parameters=sum(decision.spec.parameters for decision in decisions),
        fp4_parameters=sum(decision.spec.parameters for decision in fp4),
        bytes_before=sum(wide_bytes),
        bytes_after=after,
        reason="; ".join(reasons),
    )


def _notes(job: Job) -> tuple[str, ...]:
    notes = list(job.source.layout.notes)
    if job.output_format is OutputFormat.FAKE_QUANT:
        notes.append(
            "fake-quant: weights are rounded through NVFP4 and stay wide; nothing shrinks, it is for quality checks"
        )
    for component, scheme in job.schemes.items():
        if scheme == NVFP4 and component.why_wide:
            notes.append(f"{component.name} becomes FP4 though no default recipe does that: {component.why_wide}")
    if job.output_format.dialect and any(decision.tensor.fused for decision in job.quantized):
        notes.append("experts are stored in fused 3-D tensors; quantized ones are written one tensor per expert")
    return tuple(notes)
