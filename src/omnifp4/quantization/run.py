"""Quantizing a checkpoint: units of work through a few threads into a staging folder that becomes OUT at the end."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omnifp4.checkpoint.fingerprint import file_stamps, headers_sha256
from omnifp4.checkpoint.folds import FOLDS_NAME, Folds
from omnifp4.checkpoint.output import OutputWriter, write_json, write_text
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.checkpoint.side_files import CARD_NAME, RECEIPT_NAME, copy_side_files
from omnifp4.checkpoint.staging import Staging, partial_folder, refuse_existing
from omnifp4.checkpoint.units import Progress, check_finished, check_free_space, output_error, work_through
from omnifp4.errors import OutputError
from omnifp4.formats.scheme import Scheme
from omnifp4.quantization.calibrated import CalibratedWorker
from omnifp4.quantization.calibration_use import calibration_use
from omnifp4.quantization.decisions import Job
from omnifp4.quantization.method import Need
from omnifp4.quantization.package import artifact_config, source_name, write_config_and_index
from omnifp4.quantization.plan import component_rows, left_out
from omnifp4.quantization.visiting import Calibration, check_calibration, run_calibrated
from omnifp4.quantization.work import Worker
from omnifp4.receipt.base import package_version, this_environment
from omnifp4.receipt.calibration import CalibrationReceipt
from omnifp4.receipt.quantization import ComponentError, QuantizationReceipt, SourceRecord
from omnifp4.report.model_card import model_card


def run_job(
    job: Job,
    out: Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    prove: Callable[[Path], None] | None = None,
    calibration: Calibration | None = None,
) -> QuantizationReceipt:
    """Write the artifact that a job describes.

    Args:
        job: from `plan_job`, of a local checkpoint.
        out: folder to be made.
        resume: go on with what an earlier run of the same job left in ``OUT.partial``.
        threads: workers; as many as there are cores if not given.
        progress: told of every finished unit.
        prove: called with the finished folder before it becomes OUT; what it raises keeps OUT from appearing.
        calibration: what there is to look at inputs with, for a recipe that does.

    Returns:
        The receipt, which is also in OUT as omnifp4.json.

    Raises:
        RecipeError: the recipe lacks what it needs to see.
        OutputError: OUT exists, the disk is too small or fills up, or the leftover is of another job.
        CheckpointError: the source cannot be read or has NaN or infinite weights.
    """
    started = time.monotonic()
    source_folder = job.source.checkpoint.folder
    assert source_folder is not None, "a job to run needs a local checkpoint"
    refuse_existing(out)
    refuse_overlap(source_folder, out)
    count = threads or default_threads()
    check_calibration(job, calibration or Calibration())
    try:
        check_free_space(job.output, out, source_folder)
        with Staging(out, job_identity(job, calibration), resume=resume) as staging:
            with CheckpointReader(job.source.checkpoint) as reader, OutputWriter(staging.folder, job.output) as writer:
                resumed = check_finished(staging, job.units, writer, count)
                seen: CalibrationReceipt | None = None
                folds = Folds()
                if job.recipe.need is Need.NOTHING or calibration is None:
                    worker = Worker(reader, writer, job.rule, job.output_format)
                    work_through(job.units, staging, worker.run, count, progress)
                else:
                    looking = CalibratedWorker(reader, writer, job)
                    seen = run_calibrated(job, staging, looking, calibration, count, progress)
                    folds = looking.folds
                writer.sync()
            write_config_and_index(staging.folder, artifact_config(job), job)
            copy_side_files(source_folder, staging.folder)
            if len(folds):
                write_json(staging.folder / FOLDS_NAME, folds.to_json())
            receipt = _receipt(job, staging.finished, count, resumed, time.monotonic() - started)
            if seen is not None:
                assert calibration is not None
                use = calibration_use(job, staging.finished, seen, calibration.sensitivity_sha256)
                receipt = receipt.model_copy(update={"calibration": use})
            write_text(staging.folder / RECEIPT_NAME, receipt.model_dump_json() + "\n")
            write_text(staging.folder / CARD_NAME, model_card(receipt))
            if prove:
                prove(staging.folder)
            staging.commit()
    except OSError as error:
        raise output_error(error, partial_folder(out)) from error
    return receipt


def job_identity(job: Job, calibration: Calibration | None = None) -> dict[str, Any]:
    """Everything that decides the bytes written, for `Staging`."""
    known = {} if job.recipe.need is Need.NOTHING or calibration is None else calibration.identity()
    return {
        "omnifp4": package_version(),
        "source": headers_sha256(job.source.checkpoint),
        "files": file_stamps(job.source.checkpoint),
        "recipe": job.recipe.model_dump(mode="json"),
        "rule": job.rule_name,
        "components": dict(job.overrides),
        "format": job.output_format.value,
        "shards": {shard.file_name: shard.total_bytes for shard in job.output.shards},
        **known,
    }


def refuse_overlap(source: Path, out: Path) -> None:
    """Refuse an OUT inside the source, or made where the source is. Raises OutputError."""
    source, partial = Path(os.path.realpath(source)), Path(os.path.realpath(partial_folder(out)))
    if any(Path(os.path.realpath(path)).is_relative_to(source) for path in (out, partial)):
        raise OutputError(f"{out}: lies inside the source {source}", hint="choose an OUT beside it")
    if source.is_relative_to(partial):
        raise OutputError(f"{out}: would be made in {partial}, where the source is", hint="choose another OUT")


def default_threads() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _receipt(
    job: Job, finished: Mapping[str, Mapping[str, Any]], threads: int, resumed: int, seconds: float
) -> QuantizationReceipt:
    errors: dict[str, tuple[float, float]] = {}
    checksums: dict[str, int] = {}
    for unit in job.units:
        record = finished[unit.name]
        checksums.update(record["crc"])
        errors.update({name: (float(error), float(energy)) for name, (error, energy) in record["errors"].items()})
    rows = component_rows(job)
    source = job.source.checkpoint
    assert source.folder is not None
    name, revision = source_name(source.folder)
    return QuantizationReceipt(
        source=SourceRecord(
            model=name,
            revision=revision,
            model_type=job.source.layout.model_type,
            headers_sha256=headers_sha256(source),
            weight_bytes=source.weight_bytes,
        ),
        recipe=job.recipe.name,
        recipe_version=job.recipe.version,
        rule=job.rule_name,
        overrides=dict(job.overrides),
        output_format=job.output_format.value,
        components=rows,
        errors=_component_errors(job, errors),
        relative_squared_error=_ratio(errors.values()),
        parameters=sum(row.parameters for row in rows),
        fp4_parameters=sum(row.fp4_parameters for row in rows),
        weight_bytes=job.output.weight_bytes,
        shards={shard.file_name: shard.total_bytes for shard in job.output.shards},
        ignore=tuple(job.ignore()),
        left_out=left_out(job),
        decisions={name: _ratio([pair]) for name, pair in errors.items()},
        schemes={d.spec.name: d.scheme.value for d in job.quantized if d.scheme is not Scheme.NVFP4},
        tensors=checksums,
        backend="cpu",
        backend_reason="compiled loops, one tensor a thread",
        threads=threads,
        seconds=round(seconds, 3),
        resumed_units=resumed,
        peak_memory_bytes=peak_memory_bytes(),
        environment=this_environment(),
    )


def _component_errors(job: Job, errors: Mapping[str, tuple[float, float]]) -> dict[str, ComponentError]:
    members: dict[str, list[str]] = {}
    for decision in job.quantized:
        members.setdefault(decision.spec.component.name, []).append(decision.spec.name)
    result = {}
    for component, names in members.items():
        worst = max(names, key=lambda name: _ratio([errors[name]]))
        result[component] = ComponentError(
            linears=len(names),
            relative_squared_error=_ratio([errors[name] for name in names]),
            worst_tensor=worst,
            worst_relative_squared_error=_ratio([errors[worst]]),
        )
    return result


def _ratio(pairs: Any) -> float:
    pairs = list(pairs)
    energy = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / energy if energy else 0.0


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
