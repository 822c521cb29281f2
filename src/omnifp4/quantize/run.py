"""Quantizing a checkpoint: units of work through a few threads into a staging folder that becomes OUT at the end."""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.fingerprint import file_stamps, headers_sha256
from omnifp4.checkpoint.output import OutputWriter, write_text
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.checkpoint.side_files import CARD_NAME, RECEIPT_NAME, copy_side_files, side_file_bytes
from omnifp4.checkpoint.staging import Staging, free_bytes, partial_folder, refuse_existing
from omnifp4.errors import OutputError
from omnifp4.quantize.decisions import CopyUnit, EncodeUnit, Job
from omnifp4.quantize.package import artifact_config, write_config_and_index
from omnifp4.quantize.plan import component_rows
from omnifp4.quantize.work import Worker
from omnifp4.receipt.base import package_version, this_environment
from omnifp4.receipt.quantization import ComponentError, QuantizationReceipt, SourceRecord
from omnifp4.report.model_card import model_card

Unit = EncodeUnit | CopyUnit
Progress = Callable[[int, int, str], None]
"""Called with source bytes done, source bytes in all, and what was worked on last."""

SMALL_FILES_BYTES: Final = 16 << 20
"""Room kept for receipt, card, config and index."""


def run_job(
    job: Job,
    out: Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    prove: Callable[[Path], None] | None = None,
) -> QuantizationReceipt:
    """Write the artifact that a job describes.

    Args:
        job: from `plan_job`, of a local checkpoint.
        out: folder to be made.
        resume: go on with what an earlier run of the same job left in ``OUT.partial``.
        threads: workers; as many as there are cores if not given.
        progress: told of every finished unit.
        prove: called with the finished folder before it becomes OUT; what it raises keeps OUT from appearing.

    Returns:
        The receipt, which is also in OUT as omnifp4.json.

    Raises:
        OutputError: OUT exists, the disk is too small or fills up, or the leftover is of another job.
        CheckpointError: the source cannot be read or has NaN or infinite weights.
    """
    started = time.monotonic()
    source_folder = job.source.checkpoint.folder
    assert source_folder is not None, "a job to run needs a local checkpoint"
    refuse_existing(out)
    check_free_space(job, out)
    count = threads or len(os.sched_getaffinity(0))
    with Staging(out, job_identity(job), resume=resume) as staging:
        try:
            with CheckpointReader(job.source.checkpoint) as reader, OutputWriter(staging.folder, job.output) as writer:
                resumed = _check_finished(staging, job.units, writer, count)
                worker = Worker(reader, writer, job.rule, job.output_format)
                _work_through(job.units, staging, worker, count, progress)
                writer.sync()
            write_config_and_index(staging.folder, artifact_config(job), job)
            copy_side_files(source_folder, staging.folder)
            receipt = _receipt(job, staging.finished, count, resumed, time.monotonic() - started)
            write_text(staging.folder / RECEIPT_NAME, receipt.model_dump_json() + "\n")
            write_text(staging.folder / CARD_NAME, model_card(receipt))
            if prove:
                prove(staging.folder)
            staging.commit()
        except OSError as error:
            raise output_error(error, staging.folder) from error
    return receipt


def output_error(error: OSError, folder: Path) -> OutputError:
    """The line for a failed write: what the system said, and how to go on."""
    reason = error.strerror or str(error)
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        reason = "the disk is full"
    return OutputError(
        f"{folder}: {reason}, so the artifact is not finished",
        hint="mend that and run the same command with --resume; nothing done so far is lost",
    )


def job_identity(job: Job) -> dict[str, Any]:
    """Everything that decides the bytes written, for `Staging`."""
    return {
        "omnifp4": package_version(),
        "source": headers_sha256(job.source.checkpoint),
        "files": file_stamps(job.source.checkpoint),
        "recipe": [job.recipe.name, job.recipe.version],
        "rule": job.rule.value,
        "components": dict(job.overrides),
        "format": job.output_format.value,
        "shards": {shard.file_name: shard.total_bytes for shard in job.output.shards},
    }


def check_free_space(job: Job, out: Path) -> None:
    """Refuse to begin where the artifact cannot fit. Raises OutputError."""
    folder = job.source.checkpoint.folder
    needed = job.output.weight_bytes + SMALL_FILES_BYTES + (side_file_bytes(folder) if folder else 0)
    partial = partial_folder(out)
    written = sum(file.stat().st_blocks * 512 for file in partial.glob("*.safetensors")) if partial.is_dir() else 0
    free = free_bytes(out)
    if needed - written > free:
        raise OutputError(
            f"{out}: needs {needed - written:,} bytes and the disk has {free:,} free",
            hint="choose an OUT on another disk, or make room",
        )


def _check_finished(staging: Staging, units: Sequence[Unit], writer: OutputWriter, threads: int) -> int:
    """Compare what an earlier run wrote with its checksums; units that differ are done again."""

    def intact(unit: Unit) -> bool:
        record = staging.finished[unit.name]
        return all(writer.checksum(name) == crc for name, crc in record["crc"].items())

    known = [unit for unit in units if unit.name in staging.finished]
    with ThreadPoolExecutor(threads) as pool:
        for unit, whole in zip(known, pool.map(intact, known), strict=True):
            if not whole:
                staging.forget(unit.name)
    return len(staging.finished)


def _work_through(
    units: Sequence[Unit], staging: Staging, worker: Worker, threads: int, progress: Progress | None
) -> None:
    """Do every unit that is not done; the first error stops all threads and is raised."""
    sizes = {unit.name: _unit_bytes(unit) for unit in units}
    total = sum(sizes.values())
    done = sum(sizes[unit.name] for unit in units if unit.name in staging.finished)
    waiting = iter([unit for unit in units if unit.name not in staging.finished])
    lock, stop, errors = threading.Lock(), threading.Event(), list[BaseException]()

    def loop() -> None:
        nonlocal done
        while not stop.is_set():
            with lock:
                unit = next(waiting, None)
            if unit is None:
                return
            try:
                staging.record(unit.name, worker.run(unit))
            except BaseException as error:
                errors.append(error)
                stop.set()
                return
            with lock:
                done += sizes[unit.name]
                if progress:
                    progress(done, total, unit.name.partition(":")[2])

    workers = [threading.Thread(target=loop, name=f"quantize-{number}", daemon=True) for number in range(threads)]
    for thread in workers:
        thread.start()
    try:
        for thread in workers:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stop.set()
        for thread in workers:
            thread.join()
    if errors:
        raise errors[0]


def _unit_bytes(unit: Unit) -> int:
    if isinstance(unit, CopyUnit):
        return sum(entry.nbytes for entry in unit.entries)
    return sum(tensor.nbytes for tensor in unit.tensors)


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
    return QuantizationReceipt(
        source=SourceRecord(
            model=source.folder.absolute().name,
            model_type=job.source.layout.model_type,
            headers_sha256=headers_sha256(source),
            weight_bytes=source.weight_bytes,
        ),
        recipe=job.recipe.name,
        recipe_version=job.recipe.version,
        rule=job.rule.value,
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
        decisions={name: _ratio([pair]) for name, pair in errors.items()},
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
