"""NVFP4 linears that are damaged, and groups of them that disagree: what is wrong, and what is done about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from omnifp4.checkpoint.dtypes import WIDE_FLOATS
from omnifp4.conversion.checksums import scalar_checksum, swapped_checksum
from omnifp4.conversion.inspection import LinearState
from omnifp4.conversion.original import compare, is_damaged
from omnifp4.conversion.patient import Patient, Treatment
from omnifp4.models.base import TensorSpec
from omnifp4.models.source import SourceTensor
from omnifp4.receipt.repair import Effect

MOST_LOST_BLOCKS: Final = 0.01
"""Share of block scales that may be lost; a linear with more has lost its weights."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with one linear."""

    module: str
    kind: str
    clause: str


def judge_linears(patient: Patient, treatment: Treatment, lost: list[TensorSpec], stray: list[TensorSpec]) -> None:
    """Find what is wrong with the linears and decide what to do, group by group.

    Args:
        patient: the artifact.
        treatment: gets the decisions.
        lost: linears that should be in NVFP4 and are not there.
        stray: linears that should be in NVFP4 and are wide.
    """
    missing, wide = {spec.module for spec in lost}, {spec.module for spec in stray}
    groups: dict[str, list[str]] = {}
    for module, spec in patient.artifact.specs.items():
        if module in patient.states or module in missing or module in wide:
            groups.setdefault(spec.scale_group or module, []).append(module)
    for key, modules in groups.items():
        problems = [
            Problem(m, "tensor.missing", "it is missing, and should be in NVFP4") for m in modules if m in missing
        ]
        problems += [
            Problem(m, "fp4.mixed", "it is wide, and what engines build it into is in NVFP4")
            for m in modules
            if m in wide
        ]
        states = [patient.states[module] for module in modules if module in patient.states]
        for state in states:
            problems += list(_problems(patient, state))
        _restore_tensor_scales(patient, treatment, states, problems)
        problems += _compare(patient, treatment, states, problems)
        disagree = len({treatment.restored.get(state.module, state.tensor_scale) for state in states}) > 1
        if not problems and not disagree:
            continue
        if patient.original is None and all(module in wide and _is_wide(patient, module) for module in modules):
            treatment.own.add(key)
        originals = _find_originals(patient, modules, own=key in treatment.own)
        if originals:
            _encode_group(patient, treatment, key, originals, problems, disagree)
        else:
            before = len(patient.ledger.unmended)
            for problem in problems:
                _mend_or_fail(patient, treatment, problem)
            if disagree and len(patient.ledger.unmended) == before:
                _reconcile(patient, treatment, states)


def _is_wide(patient: Patient, module: str) -> bool:
    """Whether the artifact holds a linear's whole weight in a type that can be encoded."""
    spec = patient.artifact.specs[module]
    entry = patient.artifact.checkpoint.tensors.get(spec.name)
    return entry is not None and entry.dtype in WIDE_FLOATS and entry.shape == spec.shape


def _problems(patient: Patient, state: LinearState) -> Iterator[Problem]:
    for clause in state.wrong_parts:
        yield Problem(state.module, "linear.parts", clause)
    if state.scale_problem:
        yield Problem(state.module, "scales.tensor", state.scale_problem)
    scale = state.linear.block_scale
    if not state.wrong_parts and scale is not None and scale.dtype != "F8_E4M3":
        action = "the same bytes, said to be F8_E4M3"
        patient.ledger.mend("linear.dtype", state.module, f"its block scales are said to be {scale.dtype}", action)
    if state.counts.damaged:
        clause = f"{state.counts} of {state.counts.blocks:,} block scales"
        yield Problem(state.module, "scales.block", clause)


def _restore_tensor_scales(
    patient: Patient, treatment: Treatment, states: list[LinearState], problems: list[Problem]
) -> None:
    """Where omnifp4.json proves that a linear had the tensor scale of a sibling, it gets that one."""
    for state in states:
        entry = state.linear.tensor_scale
        recorded = patient.changed.get(entry.name) if entry is not None else None
        for sibling in states:
            if recorded is None or sibling.tensor_scale is None or sibling.tensor_scale == state.tensor_scale:
                continue
            if scalar_checksum(sibling.tensor_scale) == recorded:
                treatment.restored[state.module] = sibling.tensor_scale
                problems[:] = [p for p in problems if (p.module, p.kind) != (state.module, "scales.tensor")]
                patient.ledger.mend(
                    "scales.shared",
                    state.module,
                    f"its tensor scale is {state.tensor_scale}, not that of {sibling.module}, {sibling.tensor_scale}",
                    "the sibling's was taken: the checksum in omnifp4.json proves that it was there",
                    Effect.RESTORED,
                )
                break


def _compare(
    patient: Patient, treatment: Treatment, states: list[LinearState], problems: list[Problem]
) -> list[Problem]:
    """Swapped codes and wrong weights, by the original or by checksums; only of linears with nothing else wrong."""
    troubled = {problem.module for problem in problems}
    found = []
    for state in states:
        if state.module not in troubled:
            problem = _by_original(patient, treatment, state) or _by_checksum(patient, treatment, state)
            if problem is not None:
                found.append(problem)
    return found


def _by_original(patient: Patient, treatment: Treatment, state: LinearState) -> Problem | None:
    tensor = patient.original.find_linear(state) if patient.original else None
    if patient.original is None or tensor is None:
        return None
    made_for = treatment.restored.get(state.module)
    comparison = compare(patient.reader, state, patient.original, tensor, made_for)
    if not is_damaged(comparison.error, patient.original, tensor):
        return None
    if is_damaged(comparison.swapped_error, patient.original, tensor):
        clause = f"its relative squared error against the original is {comparison.error:.3g}"
        return Problem(state.module, "codes.wrong", clause)
    proof = f"its relative squared error is {comparison.error:.3g}, swapped back {comparison.swapped_error:.3g}"
    _swap(patient, treatment, state, proof)
    return None


def _by_checksum(patient: Patient, treatment: Treatment, state: LinearState) -> Problem | None:
    parts = [state.linear.block_scale]
    if state.module not in treatment.restored:
        parts.append(state.linear.tensor_scale)
    if state.module not in treatment.swapped:
        parts.append(state.linear.packed)
    changed = [part.name for part in parts if part is not None and part.name in patient.changed]
    packed = state.linear.packed
    if changed == [packed.name] and swapped_checksum(patient.reader, packed) == patient.changed[packed.name]:
        _swap(patient, treatment, state, "swapped back they have the checksum in omnifp4.json")
    elif changed:
        clause = f"the bytes of {' and '.join(changed)} are not those that omnifp4.json recorded"
        return Problem(state.module, "tensor.checksum", clause)
    return None


def _swap(patient: Patient, treatment: Treatment, state: LinearState, proof: str) -> None:
    treatment.swapped.add(state.module)
    treatment.mended.add(state.module)
    problem = f"the two codes of every byte are swapped: {proof}"
    patient.ledger.mend("codes.swapped", state.module, problem, "swapped back", Effect.RESTORED)


def _find_originals(patient: Patient, modules: list[str], *, own: bool) -> tuple[SourceTensor, ...]:
    """The originals of all linears of a group; empty if one of them has none. `own`: the artifact holds them wide."""
    if own:
        specs = [patient.artifact.specs[module] for module in modules]
        return tuple(SourceTensor(spec, patient.artifact.checkpoint.tensors[spec.name]) for spec in specs)
    if patient.original is None:
        return ()
    found = []
    for module in modules:
        tensor = patient.original.find(f"{module}.weight")
        spec = patient.artifact.specs[module]
        if tensor is None or tensor.spec.shape != spec.shape:
            return ()
        found.append(SourceTensor(spec, tensor.entry, tensor.fused))
    return tuple(found)


def _encode_group(
    patient: Patient,
    treatment: Treatment,
    key: str,
    originals: tuple[SourceTensor, ...],
    problems: list[Problem],
    disagree: bool,
) -> None:
    treatment.encoded[key] = originals
    modules = {tensor.spec.module for tensor in originals}
    # What was to be mended from the artifact alone is encoded with the others instead.
    patient.ledger.withdraw(modules)
    clauses: dict[str, list[Problem]] = {}
    for problem in problems:
        clauses.setdefault(problem.module, []).append(problem)
    for tensor in originals:
        module = tensor.spec.module
        mine = clauses.get(module, [])
        kind = mine[0].kind if mine else "scales.shared"
        texts = [problem.clause for problem in mine]
        if disagree:
            texts.append("its tensor scale is not that of the linears it is fused with")
        clause = "; ".join(texts) or "it shares its tensor scale with a damaged linear"
        action = "encoded from its own wide weights" if key in treatment.own else "encoded anew from the original"
        patient.ledger.mend(kind, module, clause, action, Effect.RECOMPUTED)
        treatment.restored.pop(module, None)
        treatment.swapped.discard(module)
        treatment.mended.discard(module)


def _mend_or_fail(patient: Patient, treatment: Treatment, problem: Problem) -> None:
    """Without the original: block scales may be mended, nothing else."""
    ledger, module = patient.ledger, problem.module
    counts = patient.states[module].counts if module in patient.states else None
    if problem.kind != "scales.block" or counts is None:
        ledger.fail(problem.kind, module, problem.clause)
        return
    if counts.losing > MOST_LOST_BLOCKS * counts.blocks:
        ledger.fail(problem.kind, module, f"{problem.clause}: too many to be anything but lost weights")
        return
    if (counts.nan_full or counts.nan_empty) and not patient.estimate:
        ledger.fail(problem.kind, module, f"{problem.clause}, and what a NaN was cannot be told from the file")
        return
    treatment.mended.add(module)
    actions = []
    effect = Effect.NONE
    if counts.zero_empty:
        actions.append(f"{counts.zero_empty:,} zeros over zero codes became the smallest scale")
    if counts.zero_full:
        actions.append(f"{counts.zero_full:,} zeros over other codes became the smallest scale over zero codes, which "
                       "decodes to the same zeros")  # fmt: skip
    if counts.negative:
        actions.append(f"{counts.negative:,} lost their sign bit, which no tool sets")
        effect = Effect.RESTORED
    if counts.nan_empty:
        actions.append(f"{counts.nan_empty:,} NaN over zero codes became the smallest scale, on the assumption that "
                       "these weights were zero")  # fmt: skip
        effect = Effect.ESTIMATED
    if counts.nan_full:
        actions.append(
            f"{counts.nan_full:,} NaN became the median scale of their row: a guess, for what they were is lost"
        )
        effect = Effect.ESTIMATED
    ledger.mend(problem.kind, module, problem.clause, "; ".join(actions), effect)


def _reconcile(patient: Patient, treatment: Treatment, states: list[LinearState]) -> None:
    """Give all linears of a group the tensor scale that is the largest as a factor, so that none overflows."""
    dialect = patient.artifact.dialect
    scales = {state.module: treatment.restored.get(state.module, state.tensor_scale) for state in states}
    stored = [scale for scale in scales.values() if scale is not None]
    shared = min(stored) if dialect.reciprocal else max(stored)
    said = ", ".join(f"{module.rpartition('.')[2]} {scale:.6g}" for module, scale in scales.items())
    for module, scale in scales.items():
        if scale != shared:
            treatment.tensor_scales[module] = shared
            treatment.mended.add(module)
            problem = f"tensor scales differ that kernels take for one: {said}"
            action = f"codes and block scales were re-rounded for {shared:.6g}"
            patient.ledger.mend("scales.shared", module, problem, action, Effect.ROUNDED)
