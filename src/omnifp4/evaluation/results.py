"""Scores of all positions to the figures of the receipt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omnifp4.evaluation.distributions import Scores
from omnifp4.evaluation.encoding import EncodedSample
from omnifp4.evaluation.statistics import paired_share_difference, ratio_estimate
from omnifp4.receipt.evaluation import Divergence, ModalityResult, TaskResult

ORDER = ("text", "image", "audio", "video", "mixed")


def modality_results(
    samples: Sequence[EncodedSample],
    reference: Sequence[Scores],
    model: Sequence[Scores],
    floor: Sequence[Scores],
    *,
    seed: int,
) -> tuple[ModalityResult, ...]:
    """Figures by modality of input.

    Args:
        samples: that were scored.
        reference: the reference against itself, for each sample.
        model: the model against the reference.
        floor: the second run of the reference; empty if there was none.
        seed: of the intervals.
    """
    found = []
    for modality in ORDER:
        chosen = [number for number, sample in enumerate(samples) if sample.sample.modality == modality]
        if not chosen:
            continue
        own = [reference[number] for number in chosen]
        judged = divergence(own, [model[number] for number in chosen], seed=seed)
        noise = divergence(own, [floor[number] for number in chosen], seed=seed) if floor else None
        targets = np.concatenate([scores.log_target for scores in own])
        found.append(
            ModalityResult(
                modality=modality,
                samples=len(chosen),
                positions=len(targets),
                reference_perplexity=float(np.exp(-targets.mean())),
                model=judged,
                floor=noise,
            )
        )
    return tuple(found)


def divergence(reference: Sequence[Scores], side: Sequence[Scores], *, seed: int) -> Divergence:
    """Figures of one side; positions that are not finite on it are counted and left out."""
    finite = [scores.finite for scores in side]
    counts = np.array([float(one.sum()) for one in finite])
    kl = np.concatenate([scores.kl[here] for scores, here in zip(side, finite, strict=True)])
    lost = np.array([
        float((own.log_target[here] - scores.log_target[here]).sum())
        for own, scores, here in zip(reference, side, finite, strict=True)
    ])  # fmt: skip
    said = sum(float(scores.log_target[here].sum()) for scores, here in zip(side, finite, strict=True))
    agree = np.array([float(scores.agrees[here].sum()) for scores, here in zip(side, finite, strict=True)])
    median, p90, p99 = np.percentile(kl, (50, 90, 99))
    return Divergence(
        kl_mean=ratio_estimate(np.array([scores.kl[here].sum() for scores, here in zip(side, finite, strict=True)]), counts, seed=seed),
        kl_median=float(median), kl_p90=float(p90), kl_p99=float(p99), kl_max=float(kl.max()),
        top1_agreement=ratio_estimate(agree, counts, seed=seed),
        perplexity=float(np.exp(-said / counts.sum())),
        perplexity_ratio=ratio_estimate(lost, counts, seed=seed, exponential=True),
        non_finite=int(sum(int((~one).sum()) for one in finite)),
    )  # fmt: skip


def task_results(
    samples: Sequence[EncodedSample], reference: Sequence[Scores], model: Sequence[Scores], floor: Sequence[Scores]
) -> tuple[TaskResult, ...]:
    """Right answers by task; arguments as in `modality_results`.

    An answer is right if at each of its positions, its end included, the likeliest token is the known one: then and only
    then does greedy decoding give it.
    """
    found = []
    for task in dict.fromkeys(sample.sample.task for sample in samples if sample.sample.task):
        chosen = [number for number, sample in enumerate(samples) if sample.sample.task == task]
        before = np.array([bool(reference[number].right.all()) for number in chosen])
        after = np.array([is_right(model[number]) for number in chosen])
        noise = [is_right(floor[number]) for number in chosen] if floor else None
        kinds = {samples[number].sample.modality for number in chosen}
        found.append(
            TaskResult(
                task=task,
                modality=kinds.pop() if len(kinds) == 1 else "mixed",
                samples=len(chosen),
                reference=float(before.mean()),
                model=float(after.mean()),
                floor=None if noise is None else float(np.mean(noise)),
                difference=paired_share_difference(before, after),
                lost=int((before & ~after).sum()),
                gained=int((after & ~before).sum()),
            )
        )
    return tuple(found)


def is_right(scores: Scores) -> bool:
    """Whether the known answer is what greedy decoding gives."""
    return bool((scores.right & scores.finite).all())
