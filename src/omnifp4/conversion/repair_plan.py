"""From a treatment to bytes: the tensors of every new shard, and the work that writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from omnifp4.checkpoint.dialects import Activations, StoredTensor
from omnifp4.checkpoint.dtypes import byte_count
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.output import DEFAULT_SHARD_BYTES, PlannedOutput, divide_into_shards, plan_shards
from omnifp4.conversion.artifact import in_file_order
from omnifp4.conversion.linear_units import DecodeUnit, EncodeUnit, FetchUnit, MendUnit, shape_of
from omnifp4.conversion.patient import Patient, Treatment
from omnifp4.conversion.writing import ScalarUnit, WorkUnit, copy_units


@dataclass
class RepairPlan:
    """What is written.

    Attributes:
        tensors: every tensor of the result, by name.
        copies: those whose bytes are copied from the artifact.
        scalars: single numbers.
        units: the work that is neither.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    copies: dict[str, TensorEntry] = field(default_factory=dict)
    scalars: dict[str, np.float32] = field(default_factory=dict)
    units: list[WorkUnit] = field(default_factory=list)

    def all_units(self) -> list[WorkUnit]:
        """The work, small pieces first."""
        scalars = [ScalarUnit(self.scalars)] if self.scalars else []
        return [*scalars, *self.units, *copy_units(self.copies)]


def plan_repair(patient: Patient, treatment: Treatment) -> tuple[RepairPlan, PlannedOutput]:
    """Decide every tensor of the result and its place: where it was, or behind the others if it is new."""
    plan = RepairPlan()
    _keep(patient, treatment, plan)
    _encode(patient, treatment, plan)
    _mend(patient, treatment, plan)
    _fetch(treatment, plan)
    for module in sorted(treatment.decoded):
        unit = DecodeUnit(patient.artifact.linears[module])
        plan.tensors[unit.target] = StoredTensor(unit.target, "BF16", unit.shape)
        plan.units.append(unit)
    return plan, plan_shards(_places(patient, plan))


def _keep(patient: Patient, treatment: Treatment, plan: RepairPlan) -> None:
    replaced = {
        entry.name
        for module in treatment.encoded_modules
        if (linear := patient.artifact.linears.get(module)) is not None
        for entry in (linear.packed, linear.block_scale, linear.tensor_scale)
        if entry is not None
    }
    linears = patient.artifact.linears.values()
    block_scales = {linear.block_scale.name for linear in linears if linear.block_scale is not None}
    replaced.update(f"{module}.weight" for module in treatment.encoded_modules)
    for name, entry in patient.artifact.checkpoint.tensors.items():
        if name not in replaced and name not in treatment.dropped and name not in treatment.fetched:
            dtype = "F8_E4M3" if name in block_scales else entry.dtype
            plan.tensors[name] = StoredTensor(name, dtype, entry.shape)
            plan.copies[name] = entry


def _encode(patient: Patient, treatment: Treatment, plan: RepairPlan) -> None:
    dialect = patient.artifact.dialect
    for key, tensors in treatment.encoded.items():
        plan.units.append(EncodeUnit(tensors, dialect, key in treatment.own))
        for tensor in tensors:
            stored = dialect.stored(tensor.spec.module, shape_of(tensor), Activations.WIDE)
            plan.tensors |= {part.name: part for part in stored}


def _mend(patient: Patient, treatment: Treatment, plan: RepairPlan) -> None:
    dialect = patient.artifact.dialect
    for module in sorted(treatment.mended):
        state = patient.states[module]
        made_for = treatment.restored.get(module, state.tensor_scale)
        assert made_for is not None and state.linear.block_scale is not None
        target = treatment.tensor_scales.get(module, made_for)
        plan.units.append(MendUnit(state, made_for, target, module in treatment.swapped))
        for entry in (state.linear.packed, state.linear.block_scale):
            del plan.copies[entry.name]
    for module, scale in (treatment.restored | treatment.tensor_scales).items():
        _set_scalar(plan, dialect.stored(module, (0, 0), Activations.WIDE)[2], scale)
    for module, scale in treatment.input_scales.items():
        _set_scalar(plan, dialect.stored(module, (0, 0), Activations.FP4)[3], scale)


def _set_scalar(plan: RepairPlan, tensor: StoredTensor, value: np.float32) -> None:
    plan.tensors[tensor.name] = tensor
    plan.scalars[tensor.name] = value
    plan.copies.pop(tensor.name, None)


def _fetch(treatment: Treatment, plan: RepairPlan) -> None:
    whole: dict[str, TensorEntry] = {}
    for name, found in treatment.fetched.items():
        if isinstance(found, TensorEntry):
            whole[name] = found
            plan.tensors[name] = StoredTensor(name, found.dtype, found.shape)
            continue
        plan.tensors[name] = StoredTensor(name, found.entry.dtype, found.spec.shape)
        if found.fused is None:
            whole[name] = found.entry
        else:
            plan.units.append(FetchUnit(name, found))
    plan.units += copy_units(whole, from_source=True)


def _places(patient: Patient, plan: RepairPlan) -> list[Sequence[StoredTensor]]:
    """The tensors of every shard."""
    shards: list[list[StoredTensor]] = []
    waiting = dict(plan.tensors)
    for entries in in_file_order(patient.artifact.checkpoint):
        shard = [waiting.pop(entry.name) for entry in entries if entry.name in waiting]
        if shard:
            shards.append(shard)
    new = list(waiting.values())
    if shards and new:
        size = sum(byte_count(tensor.dtype, tensor.shape) for tensor in [*shards[-1], *new])
        if size <= DEFAULT_SHARD_BYTES:
            shards[-1].extend(new)
            new = []
    if new or not shards:
        shards += divide_into_shards([tensor] for tensor in new)
    return [*shards]
