"""Repair of known damage: everything is looked at first, and OUT is made only if all of it can be mended."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omnifp4.checkpoint.fingerprint import file_stamps, headers_sha256
from omnifp4.checkpoint.output import PlannedOutput
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.checkpoint.staging import Staging, refuse_existing
from omnifp4.checkpoint.units import Progress, check_free_space, output_error
from omnifp4.conversion.artifact import Artifact, read_artifact
from omnifp4.conversion.calibrated import refuse_branches, refuse_folds
from omnifp4.conversion.checksums import changed_tensors
from omnifp4.conversion.inspection import inspect_linears
from omnifp4.conversion.judge_config import judge_claim, settle_speech
from omnifp4.conversion.judge_coverage import find_stray_wide, judge_coverage
from omnifp4.conversion.judge_inputs import judge_inputs
from omnifp4.conversion.judge_linears import judge_linears
from omnifp4.conversion.judge_package import find_lost_files, settle_settings
from omnifp4.conversion.judge_receipt import judge_receipt
from omnifp4.conversion.judge_tensors import judge_leftovers, judge_missing, judge_unreadable, judge_wide
from omnifp4.conversion.ledger import Ledger
from omnifp4.conversion.lenient import open_leniently
from omnifp4.conversion.original import Original, open_original
from omnifp4.conversion.packaging import read_receipt, without_claims, write_package
from omnifp4.conversion.patient import Patient, Treatment
from omnifp4.conversion.repair_plan import plan_repair
from omnifp4.conversion.writing import Written, write_weights
from omnifp4.errors import CheckpointError
from omnifp4.receipt.base import package_version, this_environment
from omnifp4.receipt.repair import Effect, Mend, RepairOutcome, RepairReceipt


def repair(
    source: Path,
    out: Path,
    *,
    with_source: Path | None = None,
    estimate: bool = True,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RepairReceipt:
    """Mend what is wrong with an NVFP4 artifact, or say why it cannot be mended.

    Args:
        source: folder of the artifact; it is not changed.
        out: folder to be made; it is not made if nothing is wrong, or if something cannot be mended.
        with_source: the original wide checkpoint: damaged linears are encoded from it, other tensors copied.
        estimate: block scales that are NaN may be guessed, which the receipt then says; if not, they cannot be mended
            without `with_source`.
        resume: go on with what an earlier run of the same repair left in ``OUT.partial``.
        threads: workers; as many as there are cores if not given.
        progress: told of every finished piece of work.

    Returns:
        The receipt. Whoever calls should then run `verify` on OUT.

    Raises:
        CheckpointError: the config or the original cannot be read.
        ModelError: unknown model_type or unusable config.
        OutputError: OUT exists, the disk is too small or fills up, or the leftover is of another job.
    """
    started = time.monotonic()
    refuse_existing(out)
    count = threads or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        original = None
        if with_source is not None:
            wide = open_original(with_source)
            original = Original(wide, stack.enter_context(CheckpointReader(wide.checkpoint)))
            refuse_folds(source)
        patient, treatment = examine(source, original, estimate=estimate, threads=count, stack=stack)
        refuse_branches(patient.artifact.checkpoint)
        receipt = _receipt(patient, treatment, source)
        if receipt.outcome is not RepairOutcome.MENDED:
            return receipt.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
        plan, planned = plan_repair(patient, treatment)
        check_free_space(planned, out, source)
        with Staging(out, _identity(patient, planned), resume=resume) as staging:
            try:
                source_reader = original.reader if original else None
                units = plan.all_units()
                written = write_weights(units, planned, staging, patient.reader, source_reader, count, progress)
                receipt = _finish(receipt, patient, planned, written, time.monotonic() - started)
                config = dict(patient.artifact.checkpoint.config)
                if treatment.quantization_config:
                    config = {**without_claims(config), "quantization_config": treatment.quantization_config}
                updates = _updates(source, receipt, config)
                write_package(source, staging.folder, config, planned, receipt, updates, _note(receipt))
                for name, origin in treatment.side_files.items():
                    shutil.copyfile(origin, staging.folder / name)
                staging.commit()
            except OSError as error:
                raise output_error(error, staging.folder) from error
    return receipt


def examine(
    source: Path, original: Original | None, *, estimate: bool, threads: int, stack: ExitStack
) -> tuple[Patient, Treatment]:
    """Find everything that is wrong, and decide what to do about it. `stack` closes the artifact's files."""
    ledger, treatment = Ledger(), Treatment()
    opened = open_leniently(source, ledger)
    checkpoint = settle_settings(opened.checkpoint, original, ledger)
    artifact = read_artifact(settle_speech(checkpoint, original, ledger))
    if artifact.coded:
        schemes = " and ".join(dict.fromkeys(linear.scheme.value for linear in artifact.coded.values()))
        raise CheckpointError(
            f"{source}: {len(artifact.coded):,} of its linears are in {schemes}, and repair mends NVFP4 alone",
            hint="quantize again: omnifp4 quantize MODEL OUT",
        )
    reader = stack.enter_context(CheckpointReader(artifact.checkpoint))
    weight_map = opened.weight_map or {}
    if not artifact.linears:
        patient = Patient(artifact, reader, {}, {}, original, estimate, ledger)
        judge_unreadable(patient, opened.unreadable, weight_map, ["all"])
        needs = "quantization: omnifp4 quantize ORIGINAL OUT"
        ledger.fail("nothing.quantized", source.name, "no linear is in NVFP4: it was saved wide, nothing shrank", needs)
        return patient, treatment
    states = inspect_linears(artifact, reader, threads)
    if original is not None and not any(original.find_linear(state) for state in states.values()):
        raise CheckpointError(
            f"{original.source.checkpoint.location}: has none of the weights of {source}, so it is not its original",
            hint="give the wide checkpoint that the artifact was made from",
        )
    receipt = read_receipt(source)
    judge_receipt(source, receipt, artifact.checkpoint, ledger)
    treatment.side_files = find_lost_files(source, original, ledger, is_ours=receipt is not None)
    changed = changed_tensors(reader, receipt, threads)
    patient = Patient(artifact, reader, states, changed, original, estimate, ledger)
    missing = artifact.layout.missing(artifact.logical_names)
    judge_unreadable(patient, opened.unreadable, weight_map, missing)
    judge_leftovers(artifact, treatment, ledger)
    judge_coverage(patient, treatment, receipt)
    lost = judge_missing(patient, treatment, weight_map)
    judge_linears(patient, treatment, lost, find_stray_wide(patient))
    judge_wide(patient, treatment)
    judge_inputs(patient, treatment)
    judge_claim(patient, treatment, *_result_modules(artifact, treatment))
    return patient, treatment


def _result_modules(artifact: Artifact, treatment: Treatment) -> tuple[list[str], list[str]]:
    """Modules of the linears that the result holds wide, and of those in NVFP4, in layout order."""
    encoded, known_wide = treatment.encoded_modules, set(artifact.wide_modules)
    quantized = [m for m in artifact.specs if m in encoded or (m in artifact.linears and m not in treatment.widened)]
    quantized += [m for m in artifact.quantized_modules if m not in artifact.specs]
    wide = [
        module
        for module, spec in artifact.specs.items()
        if module not in encoded
        and (module in known_wide or module in treatment.widened or spec.name in treatment.fetched)
    ]
    wide += [module for module in artifact.wide_modules if module not in artifact.specs]
    return wide, quantized


def _receipt(patient: Patient, treatment: Treatment, source: Path) -> RepairReceipt:
    ledger = patient.ledger
    if ledger.unmended:
        outcome = RepairOutcome.NOT_MENDED
    else:
        outcome = RepairOutcome.MENDED if ledger.mended else RepairOutcome.NOTHING_TO_MEND
    return RepairReceipt(
        artifact=source.absolute().name,
        original=patient.original.name if patient.original else None,
        model_type=patient.artifact.layout.model_type,
        dialect=patient.artifact.dialect.name,
        activations=treatment.activations.value,
        outcome=outcome,
        mended=tuple(ledger.mended),
        unmended=tuple(ledger.unmended),
        seconds=0.0,
        environment=this_environment(),
    )


def _identity(patient: Patient, planned: PlannedOutput) -> dict[str, Any]:
    checkpoint, original = patient.artifact.checkpoint, patient.original
    return {
        "omnifp4": package_version(),
        "verb": "repair",
        "artifact": headers_sha256(checkpoint),
        "files": file_stamps(checkpoint),
        "original": file_stamps(original.source.checkpoint) if original else None,
        "mended": [[mend.kind, mend.subject, mend.action] for mend in patient.ledger.mended],
        "shards": {shard.file_name: shard.total_bytes for shard in planned.shards},
    }


def _finish(
    receipt: RepairReceipt, patient: Patient, planned: PlannedOutput, written: Written, seconds: float
) -> RepairReceipt:
    errors = {
        module: error / energy if energy else 0.0
        for record in written.records
        for module, (error, energy) in record.get("errors", {}).items()
    }
    return receipt.model_copy(
        update={
            "mended": tuple(patient.ledger.with_errors(errors)),
            "weight_bytes": planned.weight_bytes,
            "shards": {shard.file_name: shard.total_bytes for shard in planned.shards},
            "tensors": written.checksums,
            "resumed_units": written.resumed_units,
            "seconds": round(seconds, 3),
        }
    )


def _updates(source: Path, receipt: RepairReceipt, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an earlier omnifp4.json that no longer hold."""
    decisions = (read_receipt(source) or {}).get("decisions")
    errors = dict(decisions) if isinstance(decisions, dict) else {}
    for mend in receipt.mended:
        name = f"{mend.subject}.weight"
        if mend.effect is Effect.RECOMPUTED and mend.relative_squared_error is not None:
            errors[name] = mend.relative_squared_error
        elif mend.effect in (Effect.ROUNDED, Effect.ESTIMATED):
            errors.pop(name, None)
    quantization = config.get("quantization_config")
    ignore = quantization.get("ignore") if isinstance(quantization, dict) else None
    return {
        "weight_bytes": receipt.weight_bytes,
        "shards": receipt.shards,
        "tensors": receipt.tensors,
        "decisions": errors,
        "ignore": ignore if isinstance(ignore, list) else [],
    }


def _note(receipt: RepairReceipt) -> str:
    lines = [
        "## Repaired",
        "",
        f"This folder was repaired by omnifp4 {receipt.environment.omnifp4}"
        + (f" with the original weights `{receipt.original}`" if receipt.original else " without the original weights")
        + ". Every damage and what was done about it is in `omnifp4.json`. In short:",
        "",
        *summary_lines(receipt.mended),
    ]
    return "\n".join(lines)


def summary_lines(mends: Iterable[Mend]) -> list[str]:
    """One line for each kind of mend: how many, what the first was about, what it did to the weights."""
    kinds: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Mend] = {}
    for mend in mends:
        key = (mend.kind, mend.effect.value)
        kinds[key] += 1
        first.setdefault(key, mend)
    return [
        f"- `{kind}`, {count:,} ({first[kind, effect].subject}{' …' if count > 1 else ''}): "
        f"{first[kind, effect].problem}; {first[kind, effect].action}"
        + (f" (weights {effect})" if effect != Effect.NONE.value else "")
        for (kind, effect), count in kinds.items()
    ]
