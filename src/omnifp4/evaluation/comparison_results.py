"""One artifact against another, sample by sample: differences with paired intervals, and what they say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from omnifp4.errors import OmniFP4Error
from omnifp4.evaluation.distributions import Scores
from omnifp4.evaluation.encoding import EncodedSample
from omnifp4.evaluation.results import ORDER, is_right
from omnifp4.evaluation.speech import SpokenReference, SpokenSide
from omnifp4.evaluation.speech_results import equal_codes, is_digit
from omnifp4.evaluation.statistics import paired_share_difference, paired_times, ratio_estimate
from omnifp4.receipt.comparison import Finding, ModalityDifference, SpeechDifference, TaskDifference
from omnifp4.receipt.evaluation import Estimate, EvaluationReceipt

LEAST_SAMPLES: Final = 10
"""A bootstrap of fewer is too narrow, and of one it has no width: nothing is told apart."""
SAME_BYTES: Final = 0.0005
"""Share by which two sizes may differ and be called the same: headers, and names in other words."""
HEARD: Final = "speech understood"


def modality_differences(
    samples: Sequence[EncodedSample],
    baseline: Sequence[Scores],
    artifact: Sequence[Scores],
    floors: EvaluationReceipt,
    *,
    seed: int,
) -> tuple[ModalityDifference, ...]:
    """Divergence by modality; positions that are not finite on either side are left out of both.

    Args:
        samples: that were scored.
        baseline, artifact: each against the reference, for each sample.
        floors: of an evaluation against the same reference, for its noise floors.
        seed: of the intervals.

    Raises:
        OmniFP4Error: the two have no finite position of a modality in common.
    """
    known = {item.modality: item.floor for item in floors.modalities}
    found = []
    for modality in ORDER:
        chosen = [number for number, sample in enumerate(samples) if sample.sample.modality == modality]
        if not chosen:
            continue
        both = _in_both([baseline[number] for number in chosen], [artifact[number] for number in chosen])
        if not both:
            raise OmniFP4Error(
                f"no position of {modality} has finite logits in both", hint="compare without the damaged one"
            )
        positions = np.array([float(one.finite.sum()) for one in both])
        theirs = np.array([float(one.baseline.kl[one.finite].sum()) for one in both])
        mine = np.array([float(one.artifact.kl[one.finite].sum()) for one in both])
        agreed = np.array([
            float(one.artifact.agrees[one.finite].sum()) - float(one.baseline.agrees[one.finite].sum()) for one in both
        ])  # fmt: skip
        difference = ratio_estimate(mine - theirs, positions, seed=seed)
        noise = known.get(modality)
        floor = noise.kl_mean.value if noise is not None else None
        found.append(
            ModalityDifference(
                modality=modality,
                samples=len(both),
                positions=int(positions.sum()),
                kl=float(mine.sum() / positions.sum()),
                baseline_kl=float(theirs.sum() / positions.sum()),
                kl_difference=difference,
                kl_times=paired_times(mine, theirs, seed=seed),
                top1_difference=ratio_estimate(agreed, positions, seed=seed),
                floor=floor,
                finding=told_apart(difference, floor, len(both)),
            )
        )
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Both:
    """One sample on both sides, and where both are finite."""

    baseline: Scores
    artifact: Scores
    finite: npt.NDArray[np.bool_]


def _in_both(baseline: Sequence[Scores], artifact: Sequence[Scores]) -> list[_Both]:
    """Samples with a position that is finite on both sides."""
    found = [_Both(theirs, mine, theirs.finite & mine.finite) for theirs, mine in zip(baseline, artifact, strict=True)]
    return [one for one in found if one.finite.any()]


def task_differences(
    samples: Sequence[EncodedSample], baseline: Sequence[Scores], artifact: Sequence[Scores]
) -> tuple[TaskDifference, ...]:
    """Right answers by task; arguments as in `modality_differences`."""
    found = []
    for task in dict.fromkeys(sample.sample.task for sample in samples if sample.sample.task):
        chosen = [number for number, sample in enumerate(samples) if sample.sample.task == task]
        before, after = ([is_right(side[number]) for number in chosen] for side in (baseline, artifact))
        found.append(_task(task, before, after))
    return tuple(found)


def heard_difference(
    samples: Sequence[EncodedSample], baseline: Sequence[SpokenSide], artifact: Sequence[SpokenSide]
) -> tuple[TaskDifference, ...]:
    """Spoken digits that the listener understands, as one more task; none where no digit is spoken."""
    answers = [(sample.sample.answer or "").strip() for sample in samples]
    digits = [number for number, answer in enumerate(answers) if is_digit(answer)]
    if not digits:
        return ()
    before, after = (
        [side[number].utterance.heard == answers[number] for number in digits] for side in (baseline, artifact)
    )
    return (_task(HEARD, before, after),)


def _task(name: str, before: Sequence[bool], after: Sequence[bool]) -> TaskDifference:
    theirs, mine = np.array(before, dtype=np.bool_), np.array(after, dtype=np.bool_)
    difference = paired_share_difference(theirs, mine)
    finding = Finding.WORSE if difference.high < 0 else Finding.NEARER if difference.low > 0 else Finding.SAME
    if finding is Finding.SAME and len(theirs) < LEAST_SAMPLES:
        finding = Finding.TOO_FEW
    return TaskDifference(
        task=name, samples=len(theirs), baseline=float(theirs.mean()), artifact=float(mine.mean()), difference=difference,
        lost=int((theirs & ~mine).sum()), gained=int((mine & ~theirs).sum()), finding=finding,
    )  # fmt: skip


def speech_difference(
    said: Sequence[SpokenReference],
    baseline: Sequence[SpokenSide],
    artifact: Sequence[SpokenSide],
    floors: EvaluationReceipt,
    *,
    seed: int,
) -> SpeechDifference:
    """Speech, utterance by utterance; arguments as in `modality_differences`, `said` is the reference's."""
    equal = [
        np.array([float(equal_codes(known, spoken)) for known, spoken in zip(said, side, strict=True)])
        for side in (baseline, artifact)
    ]
    codes = np.array([float(max(1, known.utterance.codes.size)) for known in said])
    both = _in_both([one.codes for one in baseline], [one.codes for one in artifact])
    if not both:
        raise OmniFP4Error("no code of speech has a finite distribution in both", hint="--no-speech leaves speech out")
    steps = np.array([float(one.finite.sum()) for one in both])
    diverged = np.array([
        float(one.artifact.kl[one.finite].sum()) - float(one.baseline.kl[one.finite].sum()) for one in both
    ])  # fmt: skip
    code_kl = ratio_estimate(diverged, steps, seed=seed)
    noise = floors.speech.floor if floors.speech is not None else None
    floor = noise.code_kl_mean.value if noise is not None else None
    return SpeechDifference(
        utterances=len(said),
        code_agreement=ratio_estimate(equal[1] - equal[0], codes, seed=seed),
        code_kl=code_kl,
        floor=floor,
        finding=told_apart(code_kl, floor, len(both)),
    )


def told_apart(difference: Estimate, floor: float | None, samples: int) -> Finding:
    """What a difference of divergences says: its interval must leave zero out, and it must be larger than the floor."""
    if samples < LEAST_SAMPLES:
        return Finding.TOO_FEW
    if abs(difference.value) <= (floor or 0.0):
        return Finding.SAME
    return Finding.WORSE if difference.low > 0 else Finding.NEARER if difference.high < 0 else Finding.SAME


def together(findings: Iterable[Finding]) -> Finding:
    """Of an artifact as a whole."""
    found = set(findings)
    if Finding.NEARER in found:
        return Finding.MIXED if Finding.WORSE in found else Finding.NEARER
    if Finding.WORSE in found:
        return Finding.WORSE
    return Finding.SAME if Finding.SAME in found else Finding.TOO_FEW


def conclusion(
    finding: Finding,
    modalities: Sequence[ModalityDifference],
    tasks: Sequence[TaskDifference],
    speech: SpeechDifference | None,
    more_bytes: float,
) -> str:
    """What an artifact gives and what it costs against the baseline, in words."""
    told = [_divergence_told(item) for item in modalities if item.finding in (Finding.NEARER, Finding.WORSE)]
    told += [
        f"{item.task} {100 * item.difference.value:+.1f} points"
        for item in tasks
        if item.finding in (Finding.NEARER, Finding.WORSE)
    ]
    if speech is not None and speech.finding in (Finding.NEARER, Finding.WORSE):
        told.append(f"speech {speech.finding.value}")
    what = ", ".join(told)
    price = bytes_told(more_bytes)
    more, fewer = more_bytes > SAME_BYTES, more_bytes < -SAME_BYTES
    if finding is Finding.NEARER:
        return f"{'worth it where the bytes are' if more else 'worth it'}: {what}, for {price}"
    if finding is Finding.MIXED:
        return f"a trade: {what}, for {price}"
    if finding is Finding.WORSE:
        return f"{'a trade' if fewer else 'not worth it'}: {what}, for {price}"
    reason = "not distinguishable" if finding is Finding.SAME else "too few samples to tell them apart"
    return f"{'cheaper' if fewer else 'not worth it'}: {reason}, for {price}"


def _divergence_told(item: ModalityDifference) -> str:
    times = item.kl_times
    if times is None or not times.value:
        return f"KL {'lower' if item.finding is Finding.NEARER else 'higher'} ({item.modality})"
    lower = item.finding is Finding.NEARER
    return f"KL {1 / times.value if lower else times.value:.2f}x {'lower' if lower else 'higher'} ({item.modality})"


def bytes_told(more: float) -> str:
    """A change of size in words."""
    if abs(more) <= SAME_BYTES:
        return "the same bytes"
    return f"{abs(100 * more):.1f} % {'more' if more > 0 else 'fewer'} bytes"
