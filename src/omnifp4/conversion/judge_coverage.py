"""Linears that are in NVFP4 though engines build them wide: heads, towers, vocoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from omnifp4.conversion.artifact import linear_entries
from omnifp4.conversion.judge_inputs import EXPERT
from omnifp4.conversion.patient import Patient, Treatment
from omnifp4.models.base import Kind, Part, TensorSpec
from omnifp4.receipt.repair import Effect

READABLE_KINDS: Final = frozenset({Kind.ATTENTION, Kind.EXPERTS, Kind.SHARED_EXPERTS, Kind.MLP})
READABLE_PARTS: Final = frozenset({Part.THINKER, Part.TALKER})


def judge_coverage(patient: Patient, treatment: Treatment, receipt: Mapping[str, Any] | None) -> None:
    """Make such linears wide again, unless our own recipe was asked for them.

    Their weights come from the original, or are decoded: that changes no weight, only how it is stored.
    """
    asked = _asked_components(receipt)
    for module, state in patient.states.items():
        spec = patient.artifact.specs.get(module)
        if spec is None or is_readable(spec) or spec.component.name in asked:
            continue
        problem = f"it is in NVFP4, and engines build {spec.component.name} wide: they cannot load the codes"
        found = patient.original.find_linear(state) if patient.original else None
        is_sound = not (state.wrong_parts or state.scale_problem or state.counts.unusable)
        if found is not None:
            treatment.fetched[f"{module}.weight"] = found
            patient.ledger.mend("fp4.coverage", module, problem, "copied from the original", Effect.RESTORED)
        elif is_sound:
            treatment.decoded.add(module)
            patient.ledger.mend("fp4.coverage", module, problem, "decoded, and stored as BF16")
        else:
            continue
        treatment.widened.add(module)
        treatment.dropped.update(entry.name for entry in linear_entries(state.linear))
    patient.states = {module: state for module, state in patient.states.items() if module not in treatment.widened}


def find_stray_wide(patient: Patient) -> list[TensorSpec]:
    """Linears that are wide though engines build them into one module with linears that are in NVFP4.

    That is q/k/v, gate/up, and all experts of a layer. Where most of such a module is wide, it cannot be mended.
    """
    modules: dict[str, list[TensorSpec]] = {}
    for spec in patient.artifact.specs.values():
        if is_readable(spec) and (spec.module in patient.states or spec.name in patient.artifact.checkpoint.tensors):
            modules.setdefault(_engine_module(spec), []).append(spec)
    stray = []
    for name, specs in modules.items():
        wide = [spec for spec in specs if spec.module not in patient.states]
        if len(specs) > 2 * len(wide):
            stray += wide
        elif 0 < len(wide) < len(specs):
            problem = f"{len(specs) - len(wide):,} of its {len(specs):,} linears are in NVFP4: engines build it as one"
            patient.ledger.fail("fp4.mixed", name, problem, "quantization: omnifp4 quantize ORIGINAL OUT")
    return stray


def _engine_module(spec: TensorSpec) -> str:
    expert = EXPERT.match(spec.module)
    return expert["experts"] if expert else spec.scale_group or spec.module


def is_readable(spec: TensorSpec) -> bool:
    """Whether engines read this linear in NVFP4."""
    return spec.component.kind in READABLE_KINDS and spec.component.part in READABLE_PARTS


def _asked_components(receipt: Mapping[str, Any] | None) -> set[str]:
    rows = (receipt or {}).get("components")
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {str(row.get("name")) for row in found if row.get("scheme") == "nvfp4"}
