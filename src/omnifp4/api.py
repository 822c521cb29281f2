"""The verbs as functions. Everything heavy is imported when it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omnifp4.calibration.statistics import Statistics
    from omnifp4.checkpoint.folder import Checkpoint
    from omnifp4.receipt.bench import BenchReceipt
    from omnifp4.receipt.calibration import CalibrationReceipt, SetReceipt
    from omnifp4.receipt.conversion import ConversionReceipt
    from omnifp4.receipt.evaluation import EvaluationReceipt
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
        statistics: a statistics file, for a recipe with a budget: which layers get what is then exact.
        revision: of a Hub id.

    Raises:
        OmniFP4Error: anything about the arguments or the checkpoint that is not right.
    """
    from omnifp4.quantization.decisions import find_format
    from omnifp4.quantization.plan import plan_job, plan_receipt
    from omnifp4.quantization.recipe import find_recipe, parse_overrides

    chosen = find_recipe(recipe).with_rule(rule).with_budget(effective_bits, counted)
    checkpoint = _headers(str(model), revision)
    job = plan_job(
        checkpoint,
        recipe=chosen,
        overrides=parse_overrides(components),
        output_format=find_format(format),
        max_shard_bytes=max_shard_bytes,
        statistics=_statistics(statistics, checkpoint),
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
    chosen = find_recipe(recipe).with_rule(rule).with_budget(effective_bits, counted)
    refuse_existing(out)

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
            threads=threads or default_threads(),
            progress=progress,
        )

    if is_hub_id(str(model)):
        # What headers tell is told before tens of gigabytes are fetched.
        planned = job_of(fetch_headers(str(model), revision), None)
        check_calibration(planned, Calibration(_statistics(statistics, None), data, device))
        check_free_space(planned.output, out, None)
        folder = fetch_model(str(model), revision)
    else:
        folder = Path(model).expanduser()
    checkpoint = open_checkpoint(folder)
    calibration = Calibration(_statistics(statistics, checkpoint), data, device)
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


def sensitivity(
    artifact: str | Path,
    *,
    against: str | Path,
    data: str | Path = "bundled",
    samples: int | None = 2,
    alone: bool = True,
    experts: bool = False,
    device: str = "auto",
    dtype: str = "bfloat16",
    cache: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SensitivityReceipt:
    """Tell where in an artifact FP4 hurts: errors of each component, layer and expert, and what each costs alone.

    Args:
        artifact: folder or Hub id of an NVFP4 checkpoint.
        against: the wide checkpoint that it was made from.
        data: ``"bundled"``, or a JSONL file of conversations.
        samples: use only the first so many of each task and modality; None uses all.
        alone: run the model once with each component and each layer alone in FP4, both models in memory; False leaves
            it at errors of weights and outputs, which need two layers in memory.
        experts: run the model once for each expert too; thousands of times on a large model.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` …
        dtype: ``"bfloat16"`` or ``"float32"``.
        cache: folder in which an interrupted run goes on; the user's cache folder if not given.
        seed: of the confidence intervals.
        progress: called with steps done, steps in all, and what was worked on.

    Raises:
        OmniFP4Error: anything about the pair, the data or memory that is not right.
    """
    from omnifp4.checkpoint.hub import local_folder
    from omnifp4.evaluation import SensitivitySettings, default_cache, run_sensitivity

    kept = Path(cache) if cache is not None else default_cache()
    settings = SensitivitySettings(data, samples, alone, device, dtype, kept, seed, experts)
    return run_sensitivity(local_folder(str(artifact)), local_folder(str(against)), settings, progress)


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


def bench(
    model: str | Path | None = None,
    *,
    synthetic: str | None = None,
    format: str = "nvfp4",
    layers: int | None = None,
    against: str | Path | None = None,
    parts: str = "thinker",
    prefill: str | Iterable[int] = (64, 2048),
    batch: str | Iterable[int] = (1, 8, 32),
    context: str | Iterable[int] = (64, 4096, 16384),
    new_tokens: int = 256,
    repeats: int = 3,
    engine: str = "auto",
    against_engine: str = "auto",
    device: str = "auto",
    quick: bool = False,
    cell_seconds: float = 15.0,
    speech_seconds: float = 8.0,
    seed: int = 0,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> BenchReceipt:
    """Measure a model: memory, time to first token, prefill and decode speed, speech; after a check of its tokens.

    Args:
        model: a checkpoint folder or a Hub id; None with `synthetic`.
        synthetic: a shape of `omnifp4.benchmark.headers.SYNTHETIC`, made with random weights on the device.
        format: of synthetic weights, ``"nvfp4"`` or ``"bf16"``.
        layers: cut a synthetic shape to so many decoder layers.
        against: a second model, measured after the first was freed: a checkpoint, or with `synthetic` a format.
        parts: what is loaded: ``"text"``, ``"thinker"`` (with towers) or ``"all"`` (speech too).
        prefill: lengths of prompts, also as ``"64,2048"``.
        batch: numbers of sequences decoded at once.
        context: lengths of prompts before decoding.
        new_tokens: that each sequence makes in a repeat.
        repeats: of every figure, at least 3.
        engine: ``"auto"``, ``"modules"`` or ``"cuda-graph"``.
        against_engine: likewise, of the reference.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` …
        quick: the shortest of `context` and the longest of `prefill` only.
        cell_seconds: about how long the repeats of one figure may take; slow engines make fewer tokens.
        speech_seconds: sound that is made in a repeat.
        seed: of prompts and synthetic weights.
        revision: of a Hub id.
        progress: called with a line for people at each figure.

    Returns:
        The record; where `passed` is False a check failed, and there is no figure of speed.

    Raises:
        OmniFP4Error: anything about the arguments or a model that is not right.
    """
    from omnifp4.benchmark import Settings, Subject, run_bench
    from omnifp4.benchmark.settings import parse_numbers
    from omnifp4.benchmark.subject import FORMATS

    lengths, contexts = parse_numbers(prefill, "prefill"), parse_numbers(context, "context")
    settings = Settings(
        prefill=lengths[-1:] if quick else lengths,
        batch=parse_numbers(batch, "batch"),
        context=contexts[:1] if quick else contexts,
        new_tokens=new_tokens,
        repeats=repeats,
        engine=engine,
        against_engine=against_engine,
        parts=parts,
        device=device,
        seed=seed,
        cell_seconds=cell_seconds,
        speech_seconds=speech_seconds,
    )
    subject = Subject(str(model or ""), synthetic or "", format, layers, revision)
    reference = None
    if against is not None and synthetic and str(against) in FORMATS:
        reference = Subject("", synthetic, str(against), layers)
    elif against is not None:
        reference = Subject(str(against))
    return run_bench(subject, settings, against=reference, on_progress=progress)


def evaluate(
    model: str | Path,
    *,
    against: str | Path,
    data: str | Path = "bundled",
    samples: int | None = None,
    segmented: bool = False,
    layers: int | None = None,
    speech: bool = True,
    floor: bool = True,
    device: str = "auto",
    dtype: str = "bfloat16",
    cache: str | Path | None = None,
    seed: int = 0,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_ppl_ratio: float | None = None,
    min_accuracy: float | None = None,
    max_accuracy_loss: float | None = None,
    min_code_agreement: float | None = None,
    progress: Progress | None = None,
) -> EvaluationReceipt:
    """Tell what a model loses against its reference, by modality, each figure beside the noise floor.

    Args:
        model: a checkpoint folder or a Hub id.
        against: the wide checkpoint that it was made from.
        data: ``"bundled"``, or a JSONL file of conversations.
        samples: use only the first so many of each task and modality.
        segmented: run the reference layer by layer from disk, and the model too where it does not fit into memory.
        layers: compare hidden states after each of the first so many layers, and do no more.
        speech: judge speech too, where both have a talker.
        floor: run the reference a second time, for the noise floor.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` …
        dtype: ``"bfloat16"`` or ``"float32"``, of both sides.
        cache: folder of what was worked out before; the user's cache folder if not given.
        seed: of the confidence intervals.
        max_kl: limit of the mean divergence in any modality, nats.
        min_top1: limit of the top-1 agreement in any modality, 0 to 1.
        max_ppl_ratio: limit of the ratio of perplexities in any modality.
        min_accuracy: limit of right answers in any task, 0 to 1.
        max_accuracy_loss: limit of right answers lost against the reference in any task, 0 to 1.
        min_code_agreement: limit of equal speech codes, free-running, 0 to 1.
        progress: called with steps done, steps in all, and what was worked on.

    Returns:
        The record. Its verdict is pass or fail where limits were set or logits are not finite.

    Raises:
        OmniFP4Error: anything about the pair, the data, memory or the limits that is not right.
    """
    from omnifp4.checkpoint.hub import local_folder
    from omnifp4.evaluation import Limits, Settings, default_cache, run_evaluation

    limits = Limits(max_kl, min_top1, max_ppl_ratio, min_accuracy, max_accuracy_loss, min_code_agreement)
    kept = Path(cache) if cache is not None else default_cache()
    settings = Settings(data, segmented, layers, device, dtype, speech, floor, kept, samples, seed, limits)
    return run_evaluation(local_folder(str(model)), local_folder(str(against)), settings, progress)


def dataset(
    out: str | Path,
    *,
    source: str | Path = "bundled",
    samples: int | None = None,
    modalities: Iterable[str] = (),
    model: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SetReceipt:
    """Make a calibration set: conversations with their media in the new folder `out`.

    Args:
        out: must not exist; it appears only when it is whole.
        source: ``"bundled"``, or a JSONL file of conversations as `evaluate` takes it.
        samples: how many, evenly over modalities; 60 if not given, or all where a file has fewer.
        modalities: only these of ``text``, ``image``, ``audio``, ``video``, ``mixed``; all if none is given.
        model: whose processor checks every conversation and counts tokens; the bundled tiny model's if not given.
        seed: of the choice.
        progress: called with conversations read, conversations in all, and the name.

    Raises:
        OmniFP4Error: the source is not right, or a conversation cannot be read.
    """
    from omnifp4.calibration.conversations import make_set
    from omnifp4.calibration.encoding import bundled_reader, open_reader
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.checkpoint.staging import refuse_existing

    refuse_existing(Path(out))
    reader = bundled_reader() if model is None else open_reader(open_checkpoint(Path(model).expanduser()))
    return make_set(
        Path(out),
        source=source,
        samples=samples,
        modalities=tuple(modalities),
        seed=seed,
        reader=reader,
        progress=progress or (lambda *_: None),
    )


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path = "bundled",
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "bfloat16",
    max_failed: float = 0.05,
    least_tokens: int = 64,
    all_expert_tokens: int = 2048,
    block_hessians: bool = True,
    speech: bool | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> CalibrationReceipt:
    """Collect statistics of what every linear and expert reads, layer by layer from disk, in the new file `out`.

    Args:
        model: a wide checkpoint's folder, or a Hub id, which is downloaded first.
        out: must not exist; it appears only when it is whole.
        data: what `dataset` made, a JSONL file, or ``"bundled"``.
        samples: only so many of it, evenly over modalities.
        seed: of that choice.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` …
        dtype: ``"bfloat16"`` or ``"float32"``.
        max_failed: share of samples that may fail.
        least_tokens: an expert with fewer routed tokens takes the all-expert statistics.
        all_expert_tokens: that every expert gets beside its own; 0 leaves it at its own.
        block_hessians: collect products within blocks of 16 inputs.
        speech: capture talker and code predictor; None: where the talker fits into memory.
        resume: go on with what an interrupted run left in ``OUT.partial``.
        progress: called with work done, work in all, and what it is.

    Raises:
        OmniFP4Error: anything about arguments, model, set or disk that is not right.
        CalibrationFailed: too many samples failed; nothing is written.
    """
    from omnifp4.calibration.capture import CaptureSettings, run_capture
    from omnifp4.checkpoint.hub import local_folder

    settings = CaptureSettings(
        samples=samples,
        seed=seed,
        device=device,
        dtype=dtype,
        max_failed=max_failed,
        least_tokens=least_tokens,
        all_expert_tokens=all_expert_tokens,
        block_hessians=block_hessians,
        speech=speech,
        resume=resume,
    )
    return run_capture(local_folder(str(model)), Path(out), data, settings, progress or (lambda *_: None))


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
