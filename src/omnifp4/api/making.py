"""Verbs that make, prove and mend artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omnifp4.calibration.statistics import Statistics
    from omnifp4.checkpoint.folder import Checkpoint
    from omnifp4.receipt.conversion import ConversionReceipt
    from omnifp4.receipt.plan import PlanReceipt
    from omnifp4.receipt.quantization import QuantizationReceipt
    from omnifp4.receipt.repair import RepairReceipt
    from omnifp4.receipt.sensitivity import SensitivityReceipt
    from omnifp4.receipt.verification import VerificationReceipt

Progress = Callable[[int, int, str], None]
DEFAULT_SHARD_BYTES = 5_000_000_000


def plan(
    model: str | Path,
    *,
    out: str | Path | None = None,
    recipe: str = "nvfp4",
    rule: str | None = None,
    components: Iterable[str] = (),
    format: str = "modelopt",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    effective_bits: float | None = None,
    counted: str | None = None,
    choose_by: str | None = None,
    sensitivity: str | Path | None = None,
    statistics: str | Path | None = None,
    revision: str | None = None,
) -> PlanReceipt:
    """Tell what `quantize` with the same arguments would do. Reads headers only, also of a Hub id.

    Args:
        model: a checkpoint folder or a Hub id.
        out: where the artifact would be made, for the free disk space there.
        recipe: name of a recipe, see `omnifp4.quantization.recipe`, or a .json file that holds one.
        rule: scale rule, if not the recipe's.
        components: overrides such as ``"talker.attention=fp8"``; schemes are those of `Scheme`.
        format: ``"modelopt"``, ``"compressed-tensors"`` or ``"fake-quant"``.
        max_shard_bytes: largest shard file.
        effective_bits, counted: budget of a recipe that has one, and whether bits are counted as ``"stored"`` or
            ``"read"`` per token.
        choose_by: what tells such a recipe how much a format costs: ``"output"``, ``"gradient"`` or ``"kl"``; see
            `omnifp4.quantization.method.Score`. With a map it is ``"kl"`` if not given.
        sensitivity: file of a sensitivity map, see `omnifp4.sensitivity`.
        statistics: a statistics file, for a recipe with a budget: which layers get what is then exact.
        revision: of a Hub id.

    Raises:
        OmniFP4Error: anything about the arguments or the checkpoint that is not right.
    """
    from omnifp4.quantization.decisions import find_format
    from omnifp4.quantization.plan import plan_job, plan_receipt
    from omnifp4.quantization.recipe import find_recipe, parse_overrides

    chosen = find_recipe(recipe).with_rule(rule).with_budget(effective_bits, counted, _score(choose_by, sensitivity))
    checkpoint = _headers(str(model), revision)
    job = plan_job(
        checkpoint,
        recipe=chosen,
        overrides=parse_overrides(components),
        output_format=find_format(format),
        max_shard_bytes=max_shard_bytes,
        statistics=_statistics(statistics, checkpoint),
        sensitivity=_map(sensitivity),
    )
    return plan_receipt(job, Path(out) if out is not None else None)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str = "nvfp4",
    rule: str | None = None,
    components: Iterable[str] = (),
    format: str = "modelopt",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    effective_bits: float | None = None,
    counted: str | None = None,
    choose_by: str | None = None,
    sensitivity: str | Path | None = None,
    statistics: str | Path | None = None,
    data: str | Path | None = None,
    device: str = "auto",
    resume: bool = False,
    threads: int | None = None,
    check: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
) -> QuantizationReceipt:
    """Write `model` in NVFP4 to the new folder `out`, streaming.

    Args:
        model: a checkpoint folder, or a Hub id, which is downloaded first.
        out: must not exist; it appears only when it is whole.
        statistics: what ``omnifp4 calibrate`` wrote, for a recipe that looks at inputs.
        data: a calibration set (a folder that ``omnifp4 dataset`` made, a JSONL file, or ``"bundled"``) that is run
            through the model beside the work, for a recipe that needs more than a file can hold.
        device: of that run.
        resume: go on with what an interrupted run left in ``OUT.partial``.
        threads: worker threads; one per core if not given.
        check: prove the artifact from its files (`verify`) before `out` appears.
        progress: called with bytes done, bytes in all, and the tensor.

    The other arguments are those of `plan`.

    Raises:
        OmniFP4Error: anything about arguments, checkpoint or disk that is not right.
        ProofError: the artifact failed its check; it is kept in ``OUT.partial``.
    """
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.checkpoint.hub import fetch_headers, fetch_model, is_hub_id
    from omnifp4.checkpoint.staging import refuse_existing
    from omnifp4.checkpoint.units import check_free_space
    from omnifp4.errors import ProofError
    from omnifp4.quantization.decisions import Job, find_format
    from omnifp4.quantization.plan import plan_job
    from omnifp4.quantization.recipe import find_recipe, parse_overrides
    from omnifp4.quantization.run import default_threads, run_job
    from omnifp4.quantization.visiting import Calibration, check_calibration
    from omnifp4.receipt.base import Verdict
    from omnifp4.verification import verify

    out = Path(out)
    overrides, output_format = parse_overrides(components), find_format(format)
    chosen = find_recipe(recipe).with_rule(rule).with_budget(effective_bits, counted, _score(choose_by, sensitivity))
    refuse_existing(out)
    drawn = _map(sensitivity)

    def prove(folder: Path) -> None:
        receipt = verify(folder, threads=threads)
        if receipt.verdict is Verdict.FAIL:
            failed = [item for item in receipt.checks if item.verdict is Verdict.FAIL]
            if [item.name for item in failed] == ["scales.plausible"]:
                # The scales are those of the weights, so it is the source that no training could have made.
                raise ProofError(
                    f"{folder}: the source's weights are of no sane size: {failed[0].findings[0]}",
                    hint="fetch the source again; with --resume --no-check the artifact is made all the same",
                )
            raise ProofError(
                f"{folder}: failed {', '.join(item.name for item in failed)}: {failed[0].summary}",
                hint=f"omnifp4 verify {folder} shows the findings; please report this",
            )

    def job_of(checkpoint: Checkpoint, known: Statistics | None) -> Job:
        return plan_job(
            checkpoint,
            recipe=chosen,
            overrides=overrides,
            output_format=output_format,
            max_shard_bytes=max_shard_bytes,
            statistics=known,
            sensitivity=drawn,
            threads=threads or default_threads(),
            progress=progress,
        )

    if is_hub_id(str(model)):
        # What headers tell is told before tens of gigabytes are fetched.
        planned = job_of(fetch_headers(str(model), revision), None)
        check_calibration(planned, Calibration(_statistics(statistics, None), data, device, sensitivity=drawn))
        check_free_space(planned.output, out, None)
        folder = fetch_model(str(model), revision)
    else:
        folder = Path(model).expanduser()
    checkpoint = open_checkpoint(folder)
    calibration = Calibration(_statistics(statistics, checkpoint), data, device, sensitivity=drawn)
    job = job_of(checkpoint, calibration.statistics)
    return run_job(
        job,
        out,
        resume=resume,
        threads=threads,
        progress=progress,
        prove=prove if check else None,
        calibration=calibration,
    )


def verify(
    artifact: str | Path,
    *,
    against: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerificationReceipt:
    """Prove an artifact, made by any tool, from its files alone.

    Args:
        artifact: folder of a quantized checkpoint.
        against: folder of the wide checkpoint it was made from; every tensor is compared.

    Raises:
        CheckpointError: the files cannot be read as a checkpoint at all.
    """
    from omnifp4.verification import verify as prove

    source = Path(against) if against is not None else None
    return prove(Path(artifact), against=source, threads=threads, progress=progress)


def convert(
    artifact: str | Path,
    out: str | Path,
    *,
    format: str,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ConversionReceipt:
    """Write an NVFP4 artifact in the other dialect, ``"modelopt"`` or ``"compressed-tensors"``; codes stay the same.

    Raises:
        OmniFP4Error: the artifact is damaged, is in that dialect already, or `out` cannot be made.
    """
    from omnifp4.conversion import convert as run

    return run(Path(artifact), Path(out), format, resume=resume, threads=threads, progress=progress)


def repair(
    artifact: str | Path,
    out: str | Path,
    *,
    source: str | Path | None = None,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RepairReceipt:
    """Mend known damage of an artifact into the new folder `out`, which is not made if anything cannot be mended.

    Args:
        artifact: folder of the damaged artifact.
        out: must not exist.
        source: folder of the wide checkpoint it was made from, to recompute what is lost.
    """
    from omnifp4.conversion import repair as run

    original = Path(source) if source is not None else None
    return run(Path(artifact), Path(out), with_source=original, resume=resume, threads=threads, progress=progress)


def _headers(model: str, revision: str | None) -> Checkpoint:
    """Config and headers of a local folder, or of a Hub id without its weights."""
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.checkpoint.hub import fetch_headers, is_hub_id

    return fetch_headers(model, revision) if is_hub_id(model) else open_checkpoint(Path(model).expanduser())


def _statistics(path: str | Path | None, checkpoint: Checkpoint | None) -> Statistics | None:
    """The open file, checked against the model where that is at hand; torch is imported only if there is one."""
    if path is None:
        return None
    from omnifp4.calibration.statistics import open_statistics

    return open_statistics(path, checkpoint)


def _score(choose_by: str | None, sensitivity: str | Path | None) -> str | None:
    return "kl" if choose_by is None and sensitivity is not None else choose_by


def _map(path: str | Path | None) -> SensitivityReceipt | None:
    if path is None:
        return None
    from omnifp4.receipt.sensitivity import SensitivityReceipt
    from omnifp4.report.reading import read_receipt

    return read_receipt(Path(path), {"sensitivity": SensitivityReceipt})[0]
