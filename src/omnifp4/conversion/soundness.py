"""Refusing to convert what is damaged, or what the other dialect cannot express."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from omnifp4.checkpoint.dialects import Activations, CodedLinear, Dialect
from omnifp4.checkpoint.dtypes import WIDE_FLOATS
from omnifp4.conversion.artifact import Artifact
from omnifp4.conversion.inspection import LinearState
from omnifp4.errors import CheckpointError, RecipeError
from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.formats.scheme import Scheme

REPAIR: Final = "omnifp4 repair IN OUT mends it or says why it cannot be mended"


def require_convertible(artifact: Artifact, target: Dialect) -> None:
    """Raise unless there is a quantized artifact of another form than `target`, with nothing that it cannot express."""
    where = artifact.checkpoint.location
    if not artifact.linears and not artifact.coded:
        raise CheckpointError(
            f"{where}: no linear is in NVFP4, so there is nothing to convert", hint="omnifp4 quantize"
        )
    claimed = artifact.claim.dialect if artifact.claim else artifact.dialect.name
    if artifact.dialect is target and claimed == target.name:
        raise RecipeError(f"{where}: is in the {target.name} dialect already")
    for spec in artifact.specs.values():
        entry = artifact.checkpoint.tensors.get(spec.name)
        is_quantized = spec.module in artifact.linears or spec.module in artifact.coded
        if entry is not None and not is_quantized and entry.dtype not in WIDE_FLOATS:
            raise CheckpointError(
                f"{where}/{entry.shard}: tensor {entry.name!r} is {entry.dtype}: a linear in a precision that is unknown here "
                "cannot be converted"
            )
    for coded in artifact.coded.values():
        _require_form(coded, target, where)
    groups = artifact.claim.raw.get("config_groups") if artifact.claim else None
    if isinstance(groups, dict) and len(groups) > 1:
        inputs = {_fp4_inputs(group) for group in groups.values() if isinstance(group, dict)} - {None}
        if len(inputs) > 1:
            raise CheckpointError(f"{where}: some linears are W4A4 and some W4A16, which cannot be converted")


def _require_form(linear: CodedLinear, target: Dialect, where: str) -> None:
    """Raise unless `target` holds a linear's codes and scales in the same bytes."""
    if problem := next(iter(linear.problems()), ""):
        raise CheckpointError(f"{where}: {problem}", hint=REPAIR)
    form = target.coded_forms.get(linear.scheme)
    if form is None:
        raise RecipeError(
            f"{where}: {linear.module} is {linear.scheme}, for which {target.name} has no form that engines read"
        )
    assert linear.scale is not None
    rows = linear.shape[0]
    if linear.input_scale is not None or (linear.scheme is not Scheme.MXFP4 and linear.scale.parameters != rows):
        raise RecipeError(
            f"{where}: {linear.module} is {linear.scheme} with one scale for the whole tensor or for its inputs; only scales "
            "per channel can be converted"
        )
    if (linear.codes.dtype, linear.scale.dtype) != (form.codes_dtype, form.scale_dtype):
        raise RecipeError(
            f"{where}: {linear.module} has {linear.codes.dtype} codes and {linear.scale.dtype} scales; {target.name} has "
            f"{form.codes_dtype} and {form.scale_dtype}"
        )


def _fp4_inputs(group: Mapping[str, Any]) -> bool | None:
    """Whether a group's inputs are FP4; None where its weights are not NVFP4."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if isinstance(weights, dict) and weights.get("group_size") not in (None, BLOCK_SIZE):
        return None
    if isinstance(weights, dict) and weights.get("num_bits", 4) != 4:
        return None
    return bool(inputs)


def require_sound(artifact: Artifact, states: Mapping[str, LinearState]) -> None:
    """Raise CheckpointError for the first damage found, saying how much more there is."""
    found = list(_damage(artifact, states))
    if found:
        more = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
        raise CheckpointError(f"{artifact.checkpoint.location}: {found[0]}{more}", hint=REPAIR)


def _damage(artifact: Artifact, states: Mapping[str, LinearState]) -> Iterator[str]:
    for module, state in states.items():
        for clause in state.wrong_parts:
            yield f"{module}: {clause}"
        if state.scale_problem:
            yield f"{module}: {state.scale_problem}"
        if state.counts.unusable:
            yield f"{module}: {state.counts} of {state.counts.blocks:,} block scales"
        if artifact.activations is Activations.FP4 and state.input_scale is None:
            yield f"{module}: the config says W4A4, but the input scale is missing or not positive"
    for key, modules in artifact.scale_groups():
        if len({states[module].tensor_scale for module in modules}) > 1:
            yield f"{key}: {' and '.join(modules)} must share one tensor scale, and theirs differ"
    for name, entry in artifact.checkpoint.tensors.items():
        spec = artifact.layout.by_name.get(name)
        if spec is not None and name not in artifact.parts and entry.shape != spec.shape:
            yield f"tensor {name!r} is {list(entry.shape)} where the config makes it {list(spec.shape)}"
    for name in artifact.layout.missing(artifact.logical_names):
        yield f"tensor {name!r} is missing"
