"""Input scales of W4A4: filled where calibration left one out, made equal where kernels take one for several."""

from __future__ import annotations

import re

import numpy as np

from omnifp4.checkpoint.dialects import Activations
from omnifp4.conversion.inspection import LinearState
from omnifp4.conversion.patient import Patient, Treatment
from omnifp4.receipt.repair import Effect

EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.\d+\.(?P<projection>\w+)$")


def judge_inputs(patient: Patient, treatment: Treatment) -> None:
    """Decide the input scale of every linear of a W4A4 artifact, and whether it stays one."""
    artifact = patient.artifact
    treatment.activations = artifact.activations
    if artifact.activations is Activations.WIDE:
        return
    modules = [m for m in artifact.quantized_modules if m not in treatment.widened]
    modules = list(dict.fromkeys([*modules, *treatment.encoded_modules]))
    scales = {
        module: state.input_scale
        for module, state in patient.states.items()
        if state.input_scale is not None and _name(state) not in patient.changed
    }
    if not scales:
        problem = "the config says W4A4, and no linear has an input scale"
        patient.ledger.mend("config.activations", "quantization_config", problem, "it says W4A16 now")
        _leave_out(patient, treatment)
        return
    filled = {module: value for module in modules if module not in scales if (value := _fill(patient, module, scales))}
    hopeless = [module for module in modules if module not in scales and module not in filled]
    if hopeless:
        problem = (
            f"the config says W4A4, but {len(hopeless):,} linears have no input scale and no expert beside them has one, "
            f"as {hopeless[0]}"
        )
        action = "it says W4A16 now, and input scales are left out; weights are as they were"
        patient.ledger.mend("config.activations", "quantization_config", problem, action)
        _leave_out(patient, treatment)
        return
    for module, value in filled.items():
        treatment.input_scales[module] = value
        problem = "it has no usable input scale"
        action = f"{value:.6g}, the largest among those of its layer, as engines take it"
        patient.ledger.mend("scales.input", module, problem, action, Effect.ESTIMATED)
    _reconcile(patient, treatment, scales | filled)


def _name(state: LinearState) -> str:
    entry = state.linear.input_scale
    return entry.name if entry is not None else ""


def _fill(patient: Patient, module: str, scales: dict[str, np.float32]) -> np.float32 | None:
    """From the linear it is fused with, which has the same input; else the largest of its projection in the layer."""
    spec = patient.artifact.specs.get(module)
    if spec is not None and spec.scale_group:
        members = (s.module for s in patient.artifact.layout.scale_groups[spec.scale_group])
        if known := [scales[member] for member in members if member in scales]:
            return _largest(patient, known)
    expert = EXPERT.match(module)
    if expert is None:
        return None
    like = re.compile(rf"{re.escape(expert['experts'])}\.\d+\.{expert['projection']}$")
    known = [value for other, value in scales.items() if like.match(other)]
    return _largest(patient, known) if known else None


def _reconcile(patient: Patient, treatment: Treatment, scales: dict[str, np.float32]) -> None:
    for specs in patient.artifact.layout.scale_groups.values():
        members = {spec.module: scales[spec.module] for spec in specs if spec.module in scales}
        if len(set(members.values())) < 2:
            continue
        shared = _largest(patient, list(members.values()))
        said = ", ".join(f"{module.rpartition('.')[2]} {value:.6g}" for module, value in members.items())
        for module, value in members.items():
            if value != shared:
                treatment.input_scales[module] = shared
                problem = f"input scales differ that kernels take for one: {said}"
                action = f"{shared:.6g}, the largest, as engines take it"
                patient.ledger.mend("scales.input", module, problem, action)


def _largest(patient: Patient, stored: list[np.float32]) -> np.float32:
    """The largest as a factor."""
    return min(stored) if patient.artifact.dialect.reciprocal else max(stored)


def _leave_out(patient: Patient, treatment: Treatment) -> None:
    treatment.activations = Activations.WIDE
    for linear in patient.artifact.linears.values():
        if linear.input_scale is not None:
            treatment.dropped.add(linear.input_scale.name)
