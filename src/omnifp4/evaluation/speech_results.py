"""Utterances of both sides to the figures of the receipt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from omnifp4.evaluation.distributions import Floats
from omnifp4.evaluation.encoding import EncodedSample
from omnifp4.evaluation.speech import SpokenReference, SpokenSide
from omnifp4.evaluation.statistics import paired_share_difference, ratio_estimate
from omnifp4.receipt.evaluation import Estimate, Recognition, SpeechFloor, SpeechResult

QUARTERS: Final = 4
LONG_SHARE: Final = 0.5
"""Of the longest utterance's frames: so long are those whose drift is told."""


def speech_result(
    samples: Sequence[EncodedSample],
    reference: Sequence[SpokenReference],
    model: Sequence[SpokenSide],
    floor: Sequence[SpokenSide],
    *,
    seed: int,
) -> SpeechResult:
    """Figures of speech.

    Args:
        samples: that were spoken.
        reference: what the reference said of each.
        model: what the model said.
        floor: the reference a second time; empty if there was none.
        seed: of the intervals.
    """
    answers = [sample.sample.answer or "" for sample in samples]
    return SpeechResult(
        utterances=len(samples),
        frames=sum(len(one.utterance.codes) for one in reference),
        long_utterances=len(long_utterances(reference)),
        floor=SpeechFloor(**side_figures(answers, reference, floor, seed=seed)) if floor else None,
        **side_figures(answers, reference, model, seed=seed),
    )


def long_utterances(reference: Sequence[SpokenReference]) -> list[int]:
    """Numbers of the utterances that are at least `LONG_SHARE` as long as the longest, and have a frame a quarter."""
    frames = [len(one.utterance.codes) for one in reference]
    least = max(QUARTERS, LONG_SHARE * max(frames))
    return [number for number, count in enumerate(frames) if count >= least]


def side_figures(
    answers: Sequence[str], reference: Sequence[SpokenReference], side: Sequence[SpokenSide], *, seed: int
) -> dict[str, Any]:
    """What `SpeechResult` and `SpeechFloor` have in common, of one side.

    Args:
        answers: what was to be said, by utterance.
        reference: what the reference said.
        side: what this side said.
        seed: of the intervals.
    """
    pairs = list(zip(reference, side, strict=True))
    equal = np.array([float(equal_codes(known, said)) for known, said in pairs])
    # Where the reference says nothing, saying nothing is what there is to agree on.
    codes = np.array([float(max(1, known.utterance.codes.size)) for known, _ in pairs])
    steps = np.array([float(said.codes.finite.sum()) for _, said in pairs])
    if not steps.any():  # nothing to take a mean of; `non_finite` tells
        steps = np.ones(len(pairs))
    agreed = np.array([float(said.codes.agrees[said.codes.finite].sum()) for _, said in pairs])
    diverged = np.array([float(said.codes.kl[said.codes.finite].sum()) for _, said in pairs])
    frames = sum(len(known.utterance.codes) for known, _ in pairs)
    return {
        "code_agreement": ratio_estimate(equal, codes, seed=seed),
        "first_code_agreement": ratio_estimate(agreed, steps, seed=seed),
        "code_kl_mean": ratio_estimate(diverged, steps, seed=seed),
        **_later_codes([said for _, said in pairs], seed),
        "drift": _drift([side[number] for number in long_utterances(reference)], seed),
        "frames_ratio": sum(len(said.utterance.codes) for _, said in pairs) / max(1, frames),
        "recognition": _recognition(answers, reference, side),
        "non_finite": sum(not _is_finite(said) for _, said in pairs),
    }


def _is_finite(said: SpokenSide) -> bool:
    later = said.later is None or bool(said.later.finite.all())
    return said.utterance.finite and bool(said.codes.finite.all()) and later


def _later_codes(side: Sequence[SpokenSide], seed: int) -> dict[str, Estimate]:
    """Figures of the code predictor's codes; none where nothing was said or all of it is not finite."""
    later = [said.later for said in side if said.later is not None]
    steps = np.array([float(one.finite.sum()) for one in later])
    if not steps.sum():
        return {}
    agreed = np.array([float(one.agrees[one.finite].sum()) for one in later])
    diverged = np.array([float(one.kl[one.finite].sum()) for one in later])
    return {
        "later_code_agreement": ratio_estimate(agreed, steps, seed=seed),
        "later_code_kl_mean": ratio_estimate(diverged, steps, seed=seed),
    }


def equal_codes(known: SpokenReference, said: SpokenSide) -> int:
    """Codes of the reference that this side gives at the same frame and group; 1 where neither says anything."""
    mine, theirs = said.utterance.codes, known.utterance.codes
    both = min(len(mine), len(theirs))
    if not theirs.size:
        return int(not mine.size)
    return int((mine[:both] == theirs[:both]).sum())


def _drift(long: Sequence[SpokenSide], seed: int) -> tuple[Estimate, ...]:
    """Mean divergence in each quarter of time, over utterances."""
    if not long:
        return ()
    sums, counts = np.zeros((QUARTERS, len(long))), np.zeros((QUARTERS, len(long)))
    for number, said in enumerate(long):
        values: Floats = np.where(said.codes.finite, said.codes.kl, 0.0)
        for quarter, places in enumerate(np.array_split(np.arange(len(values)), QUARTERS)):
            sums[quarter, number] = values[places].sum()
            counts[quarter, number] = said.codes.finite[places].sum()
    return tuple(
        ratio_estimate(sums[quarter], counts[quarter], seed=seed)
        for quarter in range(QUARTERS)
        if counts[quarter].sum()
    )


def _recognition(
    answers: Sequence[str], reference: Sequence[SpokenReference], side: Sequence[SpokenSide]
) -> Recognition | None:
    digits = [number for number, answer in enumerate(answers) if is_digit(answer)]
    if not digits:
        return None
    before, after = (
        np.array([spoken[number].utterance.heard == answers[number].strip() for number in digits])
        for spoken in (reference, side)
    )
    return Recognition(
        utterances=len(digits), reference=float(before.mean()), model=float(after.mean()),
        difference=paired_share_difference(before, after),
    )  # fmt: skip


def is_digit(answer: str) -> bool:
    """Whether an answer is one digit, which the listener can hear."""
    answer = answer.strip()
    return len(answer) == 1 and answer.isascii() and answer.isdigit()
