"""Refusing to convert what is damaged, or what the other dialect cannot express."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from omnifp4.checkpoint.dialects import Activations, Dialect
from omnifp4.checkpoint.dtypes import WIDE_FLOATS
from omnifp4.conversion.artifact import Artifact
from omnifp4.conversion.inspection import LinearState
from omnifp4.errors import CheckpointError, RecipeError

REPAIR: Final = "omnifp4 repair IN OUT mends it or says why it cannot be mended"


def require_convertible(artifact: Artifact, target: Dialect) -> None:
    """Raise unless there is an NVFP4 artifact of another form than `target`, with nothing of other precisions."""
    where = artifact.checkpoint.location
    if not artifact.linears:
        raise CheckpointError(
            f"{where}: no linear is in NVFP4, so there is nothing to convert", hint="omnifp4 quantize"
        )
    claimed = artifact.claim.dialect if artifact.claim else artifact.dialect.name
    if artifact.dialect is target and claimed == target.name:
        raise RecipeError(f"{where}: is in the {target.name} dialect already")
    for spec in artifact.specs.values():
        entry = artifact.checkpoint.tensors.get(spec.name)
        if entry is not None and spec.module not in artifact.linears and entry.dtype not in WIDE_FLOATS:
            raise CheckpointError(
                f"{where}/{entry.shard}: tensor {entry.name!r} is {entry.dtype}: a linear in another precision than NVFP4 "
                "cannot be converted"
            )
    groups = artifact.claim.raw.get("config_groups") if artifact.claim else None
    if isinstance(groups, dict) and len(groups) > 1:
        inputs = {bool(group.get("input_activations")) for group in groups.values() if isinstance(group, dict)}
        if len(inputs) > 1:
            raise CheckpointError(f"{where}: some linears are W4A4 and some W4A16, which cannot be converted")


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
