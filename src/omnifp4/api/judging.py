"""Verbs that measure what an artifact does and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omnifp4.receipt.bench import BenchReceipt
    from omnifp4.receipt.comparison import ComparisonReceipt
    from omnifp4.receipt.evaluation import EvaluationReceipt
    from omnifp4.receipt.sensitivity import SensitivityReceipt
    from omnifp4.receipt.speech_search import SpeechSearchReceipt

Progress = Callable[[int, int, str], None]


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


def compare(
    models: Iterable[str | Path],
    *,
    against: str | Path,
    baseline: str | Path | None = None,
    data: str | Path = "bundled",
    samples: int | None = None,
    segmented: bool = False,
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
) -> ComparisonReceipt:
    """Tell which of several artifacts of one checkpoint is worth it: what each loses, and the differences between them.

    The reference runs once, every artifact on the same samples; differences and their intervals are of pairs of samples.

    Args:
        models: two or more checkpoint folders or Hub ids.
        against: the wide checkpoint that all of them were made from.
        baseline: one of `models`, with which the others are compared; the first if not given.

    The other arguments are those of `evaluate`; limits are set to each artifact.

    Returns:
        The record, with the whole record of each evaluation.

    Raises:
        OmniFP4Error: fewer than two models, one given twice, a baseline that is none of them, or as `evaluate`.
    """
    from omnifp4.checkpoint.hub import local_folder
    from omnifp4.errors import OmniFP4Error
    from omnifp4.evaluation import Limits, Settings, default_cache, run_comparison

    given = [str(model) for model in models]
    if baseline is not None and str(baseline) not in given:
        raise OmniFP4Error(f"baseline {str(baseline)!r} is none of the models", hint=f"allowed: {', '.join(given)}")
    limits = Limits(max_kl, min_top1, max_ppl_ratio, min_accuracy, max_accuracy_loss, min_code_agreement)
    kept = Path(cache) if cache is not None else default_cache()
    settings = Settings(data, segmented, None, device, dtype, speech, floor, kept, samples, seed, limits)
    number = 0 if baseline is None else given.index(str(baseline))
    folders = [local_folder(model) for model in given]
    return run_comparison(folders, local_folder(str(against)), settings, progress, baseline=number)


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


def speech_recipe(
    model: str | Path,
    *,
    data: str | Path = "bundled",
    samples: int | None = None,
    base: str = "nvfp4",
    schemes: Iterable[str] = ("nvfp4", "fp8"),
    times_floor: float = 10.0,
    name: str = "own-speech",
    device: str = "auto",
    cache: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SpeechSearchReceipt:
    """Search which schemes a model's talker and code predictor bear, and make a recipe of it.

    Args:
        model: folder or Hub id of a wide checkpoint with a talker.
        data: ``"bundled"``, or a JSONL file of conversations; those with an answer and ``"speak": true`` are spoken.
        samples: use only the first so many of each task and modality.
        base: recipe of the thinker.
        schemes: to try; a component gets the smallest that its speech bears.
        times_floor: a divergence up to so many times that of the noise floor is borne.
        name: of the recipe.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` …
        cache: folder in which an interrupted run goes on; the user's cache folder if not given.
        seed: of the confidence intervals.
        progress: called with steps done, steps in all, and what was worked on.

    Returns:
        The record; its `recipe`, written as JSON, is what ``--recipe FILE.json`` takes.

    Raises:
        OmniFP4Error: anything about the checkpoint, the data, memory or the settings that is not right.
    """
    from omnifp4.checkpoint.hub import local_folder
    from omnifp4.errors import OmniFP4Error
    from omnifp4.evaluation import SpeechSearchSettings, default_cache, search_speech
    from omnifp4.formats.scheme import Scheme

    wanted = list(schemes)
    for scheme in wanted:
        if scheme not in tuple(Scheme):
            raise OmniFP4Error(f"scheme {scheme!r} is unknown", hint=f"allowed: {', '.join(Scheme)}")
    kept = Path(cache) if cache is not None else default_cache()
    settings = SpeechSearchSettings(
        data, samples, base, tuple(Scheme(scheme) for scheme in wanted), times_floor, name, device, kept, seed
    )
    return search_speech(local_folder(str(model)), settings, progress)
