"""Several artifacts of one reference in one run: the reference runs once, each artifact on the same samples, and then
each is set against the baseline sample by sample."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnifp4.errors import OmniFP4Error
from omnifp4.evaluation.artifacts import bits_per_weight, told_recipe
from omnifp4.evaluation.comparison_results import (
    SAME_BYTES,
    conclusion,
    heard_difference,
    modality_differences,
    speech_difference,
    task_differences,
    together,
)
from omnifp4.evaluation.run import Judged, Judgement, Progress, Settings, prepare
from omnifp4.receipt.base import Verdict, as_text, this_environment
from omnifp4.receipt.comparison import ArtifactComparison, ComparisonReceipt, Finding


def run_comparison(
    models: Sequence[Path], against: Path, settings: Settings, progress: Progress | None, *, baseline: int = 0
) -> ComparisonReceipt:
    """Evaluate artifacts against one reference, and compare each with one of them.

    Args:
        models: two or more folders.
        against: the wide checkpoint that all were made from.
        settings: of each evaluation; limits are set to each.
        progress: called with steps done, steps in all, and what was worked on.
        baseline: number of the model that the others are compared with.

    Raises:
        OmniFP4Error: fewer than two, one given twice, hidden states asked for, or anything that `run_evaluation` refuses.
    """
    begin = time.monotonic()
    check_models(models)
    if settings.layers is not None:
        raise OmniFP4Error("--layers compares hidden states of one model", hint="give one MODEL, or leave --layers out")
    run = prepare(models, against, settings, progress)
    with run.threads():
        found = run.whole(begin)
    first = found.models[baseline]
    artifacts = tuple(_compared(one, first, found, settings.seed) for one in found.models)
    evaluations = tuple(one.receipt for one in found.models)
    failed = any(one.verdict is Verdict.FAIL for one in evaluations)
    limits = any(one.gates for one in evaluations)
    like = first.receipt
    return ComparisonReceipt(
        against=like.against, model_type=like.model_type, baseline=like.model, data=like.data,
        data_sha256=like.data_sha256, samples=like.samples, dtype=like.dtype, device=like.device, seed=like.seed,
        resamples=like.resamples, artifacts=artifacts, evaluations=evaluations, worth=worth(artifacts, like.model),
        notes=_notes(artifacts, found), verdict=Verdict.FAIL if failed else Verdict.PASS if limits else Verdict.NOT_CHECKED,
        seconds=time.monotonic() - begin, environment=this_environment(),
    )  # fmt: skip


def check_models(models: Sequence[Path]) -> None:
    """Refuse a list that cannot be compared.

    Raises:
        OmniFP4Error: fewer than two, or one given twice.
    """
    if len(models) < 2:
        raise OmniFP4Error(f"{len(models)} model to compare", hint="two or more are needed; evaluate judges one")
    places = [model.resolve() for model in models]
    for place in places:
        if places.count(place) > 1:
            raise OmniFP4Error(f"{place} is given twice", hint="name each artifact once")
        if len({one for one in places if one.name == place.name}) > 1:
            raise OmniFP4Error(
                f"two artifacts are named {place.name!r}, and tables name them so", hint="rename one folder"
            )


def _compared(one: Judged, baseline: Judged, found: Judgement, seed: int) -> ArtifactComparison:
    checkpoint = one.pair.model
    recipe, rule = told_recipe(checkpoint)
    size = checkpoint.weight_bytes
    more_bytes = size / baseline.pair.model.weight_bytes - 1
    shared: dict[str, Any] = {
        "model": as_text(checkpoint.location), "recipe": recipe, "rule": rule, "weight_bytes": size,
        "bits_per_weight": bits_per_weight(checkpoint, one.pair.reference), "more_bytes": more_bytes,
        "verdict": one.receipt.verdict,
    }  # fmt: skip
    if one is baseline:
        return ArtifactComparison(
            modalities=(), tasks=(), speech=None, finding=None, conclusion="the baseline" + _broken(one), **shared
        )
    modalities = modality_differences(found.samples, baseline.scores, one.scores, baseline.receipt, seed=seed)
    tasks = task_differences(found.samples, baseline.scores, one.scores)
    speech = None
    if baseline.spoken and one.spoken:
        speech = speech_difference(found.said, baseline.spoken, one.spoken, baseline.receipt, seed=seed)
        spoken = [sample for sample in found.samples if sample.sample.speak]
        tasks += heard_difference(spoken, baseline.spoken, one.spoken)
    finding = together(item.finding for item in (*modalities, *tasks, *((speech,) if speech else ())))
    told = conclusion(finding, modalities, tasks, speech, more_bytes)
    return ArtifactComparison(
        modalities=modalities, tasks=tasks, speech=speech, finding=finding, conclusion=told + _broken(one), **shared
    )


def _broken(one: Judged) -> str:
    broken = [gate.option for gate in one.receipt.gates if gate.verdict is Verdict.FAIL]
    return f"; fails {', '.join(dict.fromkeys(broken))}" if broken else ""


def worth(artifacts: Sequence[ArtifactComparison], baseline: str) -> str:
    """The answer in a sentence: what is nearer to the reference, at no price and at a price; what is only smaller."""
    name = Path(baseline).name
    sound = [one for one in artifacts if one.finding is not None and one.verdict is not Verdict.FAIL]

    def named(finding: Finding, *, more: bool | None = None, fewer: bool | None = None) -> list[str]:
        return [
            Path(one.model).name
            for one in sound
            if one.finding is finding
            and (more is None or (one.more_bytes > SAME_BYTES) is more)
            and (fewer is None or (one.more_bytes < -SAME_BYTES) is fewer)
        ]

    told = []
    if free := named(Finding.NEARER, more=False):
        told.append(f"worth it over {name} at no more bytes: {', '.join(free)}")
    if dear := named(Finding.NEARER, more=True):
        told.append(f"nearer than {name} for more bytes: {', '.join(dear)}")
    if small := named(Finding.SAME, fewer=True):
        told.append(f"smaller than {name} and not told apart from it: {', '.join(small)}")
    if mixed := named(Finding.MIXED):
        told.append(f"nearer than {name} in one respect and worse in another: {', '.join(mixed)}")
    broken = [
        Path(one.model).name
        for one in artifacts
        if one.verdict is Verdict.FAIL and one.finding in (Finding.NEARER, Finding.MIXED)
    ]
    if broken:
        told.append(f"nearer than {name} in some respect, but failed: {', '.join(broken)}")
    if not free and not dear and not mixed and not broken:
        told.append(f"nothing is nearer to the reference than {name} by more than these samples can tell")
    return "; ".join(told)


def _notes(artifacts: Sequence[ArtifactComparison], found: Judgement) -> tuple[str, ...]:
    intervals = sum(len(one.modalities) + len(one.tasks) + (one.speech is not None) for one in artifacts)
    notes = [
        f"{intervals:,} intervals of 95 % were looked at: of so many, about {max(1, round(intervals / 20)):,} would leave "
        "zero out by chance alone"
    ]
    silent = [Path(one.pair.model.location).name for one in found.models if not one.spoken]
    if silent and len(silent) < len(found.models):
        notes.append(f"speech of {', '.join(silent)} was not judged, so it is not compared")
    return tuple(notes)
