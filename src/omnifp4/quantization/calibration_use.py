"""What a calibrated run looked at and gave, gathered from its journal for the receipt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from omnifp4.quantization.calibrated import FOLD_UNIT
from omnifp4.quantization.decisions import Job
from omnifp4.quantization.method import Gptq
from omnifp4.receipt.calibration import CalibrationReceipt
from omnifp4.receipt.quantization import CalibrationUse, OutputError

MOST_NAMED: Final = 20
"""Linears that nothing was known of, by name in the receipt."""


def calibration_use(
    job: Job, finished: Mapping[str, Mapping[str, Any]], seen: CalibrationReceipt, sensitivity_sha256: str = ""
) -> CalibrationUse:
    """Sums up the units of a finished job.

    Args:
        job: that was done.
        finished: what each unit recorded.
        seen: receipt of the statistics, or of the run over the set.
        sensitivity_sha256: of the map that a budget chose by.
    """
    records = [finished[unit.name] for unit in job.units]
    folds = [record for name, record in finished.items() if name.startswith(FOLD_UNIT)]
    sources = {name: source for record in records for name, source in record.get("sources", {}).items()}
    damping = [value for record in records for value in record.get("damping", {}).values()]
    asked = job.recipe.method.damping if isinstance(job.recipe.method, Gptq) else 0.0
    return CalibrationUse(
        method=job.recipe.method.model_dump(mode="json"),
        weighting=job.recipe.weighting.value,
        activations=job.recipe.activations.value,
        data=seen.data,
        data_sha256=seen.data_sha256,
        samples=seen.samples,
        tokens=sum(seen.tokens.values()),
        sources=dict(sorted(Counter(sources.values()).items())),
        data_free=tuple(name for name, source in sources.items() if source == "none")[:MOST_NAMED],
        folds=sum(record.get("fold") is not None for record in folds),
        fold_places=len(folds),
        more_damped=sum(value is not None and value > 1.001 * asked for value in damping),
        not_inverted=sum(value is None for value in damping),
        sibling_scales=sum(len(record.get("input_scale_of_siblings", ())) for record in records),
        learned_together=sum(record.get("learned", 0) for record in records),
        sensitivity_sha256=sensitivity_sha256,
        outputs=_outputs(job, {n: v for record in records for n, v in record.get("outputs", {}).items()}),
    )


def _outputs(job: Job, outputs: Mapping[str, list[float]]) -> dict[str, OutputError]:
    members: dict[str, list[list[float]]] = {}
    for decision in job.quantized:
        if decision.spec.name in outputs:
            members.setdefault(decision.spec.component.name, []).append(outputs[decision.spec.name])
    return {component: _output(values) for component, values in members.items()}


def _output(values: Iterable[list[float]]) -> OutputError:
    known = [value for value in values if value[2] > 0]
    error, data_free, energy = (sum(value[part] for value in known) for part in range(3))
    return OutputError(
        linears=len(known),
        error=error / energy if energy else 0.0,
        data_free=data_free / energy if energy else 0.0,
    )
