"""The record of a comparison: several artifacts of one reference on the same samples, and which of them is worth it."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record, Verdict
from omnifp4.receipt.evaluation import Estimate, EvaluationReceipt

COMPARISON_VERSION: Final = 1
"""Raised when a finding of the same data would come out otherwise: differences, intervals, what counts as told apart."""


class Finding(StrEnum):
    """What a paired difference says of an artifact against the baseline."""

    NEARER = "nearer"
    """To the reference."""
    WORSE = "worse"
    MIXED = "mixed"
    """Nearer in one respect and worse in another; of an artifact as a whole only."""
    SAME = "not distinguishable"
    TOO_FEW = "too few samples"


class ModalityDifference(Record):
    """One modality of input, an artifact against the baseline, sample by sample.

    Attributes:
        modality: as in `omnifp4.receipt.evaluation.ModalityResult`.
        samples, positions: that are finite on both.
        kl: mean divergence from the reference, of the artifact, in nats.
        baseline_kl: the same of the baseline.
        kl_difference: the first less the second, paired.
        kl_times: the first over the second, paired; None where the baseline does not diverge at all.
        top1_difference: share of positions with the reference's likeliest token, artifact less baseline, paired.
        floor: the reference's divergence from itself, see `EvaluationReceipt.noise_floor`; None if it was not run.
        finding: nearer or worse where the interval of `kl_difference` leaves zero out and the difference is larger than
            the floor.
    """

    modality: str
    samples: int
    positions: int
    kl: float
    baseline_kl: float
    kl_difference: Estimate
    kl_times: Estimate | None
    top1_difference: Estimate
    floor: float | None
    finding: Finding


class TaskDifference(Record):
    """Right answers, an artifact against the baseline, sample by sample.

    Attributes:
        task: name in the data, or ``speech understood``.
        samples: with a known answer.
        baseline, artifact: share of right answers.
        difference: artifact less baseline, paired.
        lost, gained: samples that only the baseline answers, and that only the artifact answers.
        finding: worse or nearer where the interval leaves zero out, which holds for few samples too.
    """

    task: str
    samples: int
    baseline: float
    artifact: float
    difference: Estimate
    lost: int
    gained: int
    finding: Finding


class SpeechDifference(Record):
    """Speech out, an artifact against the baseline, utterance by utterance.

    Attributes:
        utterances: spoken by both.
        code_agreement: share of the reference's codes given at the same place, free-running, artifact less baseline.
        code_kl: mean divergence of the next code given the past, artifact less baseline, nats.
        floor: of `code_kl`: the reference against itself; None if it was not run.
        finding: by `code_kl`, as in `ModalityDifference`.
    """

    utterances: int
    code_agreement: Estimate
    code_kl: Estimate
    floor: float | None
    finding: Finding


class ArtifactComparison(Record):
    """One artifact against the baseline.

    Attributes:
        model: folder.
        recipe, rule: as its own receipt tells them.
        weight_bytes: of all shard files.
        bits_per_weight: bits of all its tensors over the parameters of the reference.
        more_bytes: weight bytes over those of the baseline, less 1.
        modalities, tasks, speech: differences; empty and None for the baseline itself.
        finding: of all of them together; None for the baseline.
        conclusion: in words, with the price in bytes.
        verdict: of its evaluation: whether it kept the limits that were set and all is finite.
    """

    model: str
    recipe: str
    rule: str
    weight_bytes: int
    bits_per_weight: float
    more_bytes: float
    modalities: tuple[ModalityDifference, ...]
    tasks: tuple[TaskDifference, ...]
    speech: SpeechDifference | None
    finding: Finding | None
    conclusion: str
    verdict: Verdict


class ComparisonReceipt(Record):
    """The record of ``omnifp4 evaluate A B … --against REFERENCE``.

    Attributes:
        against: the reference's folder.
        baseline: folder of the artifact that the others are compared with.
        data, data_sha256, samples, dtype, device, seed, resamples: as in an evaluation, the same for all.
        artifacts: in the order in which they were given, the baseline among them.
        evaluations: the whole record of each, in the same order.
        worth: the answer in one sentence.
        verdict: fail if any artifact's evaluation failed.
    """

    receipt: str = "comparison"
    version: int = RECEIPT_VERSION
    comparison_version: int = COMPARISON_VERSION
    against: str
    model_type: str
    baseline: str
    data: str
    data_sha256: str
    samples: int
    dtype: str
    device: str
    seed: int
    resamples: int
    artifacts: tuple[ArtifactComparison, ...]
    evaluations: tuple[EvaluationReceipt, ...]
    worth: str
    notes: tuple[str, ...]
    verdict: Verdict
    seconds: float
    environment: Environment
