"""The record of an evaluation: what a model loses against its reference, each figure beside the noise floor."""

from __future__ import annotations

from typing import Final

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record, Verdict

METRIC_VERSION: Final = 1
"""Raised when a figure of the same data would come out otherwise: positions, divergence, intervals, tasks."""


class Estimate(Record):
    """A figure with its 95 % confidence interval.

    Attributes:
        value: of all samples.
        low, high: the interval: of a change of a share, Bonett and Price's for paired data; of all else, percentiles of a
            seeded bootstrap over samples, where both sides of a comparison saw the same resampled samples.
    """

    value: float
    low: float
    high: float


class Divergence(Record):
    """How far next-token distributions are from the reference's, over all scored positions.

    Attributes:
        kl_mean: mean Kullback-Leibler divergence of the reference from this side, in nats.
        kl_median, kl_p90, kl_p99, kl_max: over positions.
        top1_agreement: share of positions where both sides' likeliest token is the same.
        perplexity: of the answers' tokens on this side.
        perplexity_ratio: this side's perplexity over the reference's.
        non_finite: positions with a NaN or an infinity; they are in none of the other figures.
    """

    kl_mean: Estimate
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_max: float
    top1_agreement: Estimate
    perplexity: float
    perplexity_ratio: Estimate
    non_finite: int


class ModalityResult(Record):
    """One modality of input.

    Attributes:
        modality: ``text``, ``image``, ``audio``, ``video``, or ``mixed`` where one sample has several media.
        samples, positions: how many were compared.
        reference_perplexity: of the answers' tokens on the reference.
        model: the model against the reference.
        floor: the reference against itself, see `EvaluationReceipt.noise_floor`; None if it was not run.
    """

    modality: str
    samples: int
    positions: int
    reference_perplexity: float
    model: Divergence
    floor: Divergence | None


class TaskResult(Record):
    """Answers that are known.

    Attributes:
        task: name in the data, such as ``picture digit``.
        modality: as in `ModalityResult`.
        samples: with a known answer.
        reference, model: share whose greedy answer is the known one, token for token and end included.
        floor: the same of the reference under the change of the noise floor; None if it was not run.
        difference: model minus reference, paired.
        lost, gained: samples that only the reference answers, and that only the model answers.
    """

    task: str
    modality: str
    samples: int
    reference: float
    model: float
    floor: float | None
    difference: Estimate
    lost: int
    gained: int


class Recognition(Record):
    """How well spoken digits are understood: ``1 - share`` is the recognition error.

    Attributes:
        utterances: spoken digits.
        reference, model: share that the classifier hears as the digit that was to be said.
        difference: model minus reference, paired.
    """

    utterances: int
    reference: float
    model: float
    difference: Estimate


class SpeechFloor(Record):
    """The reference's speech against its own, under the change of the noise floor; figures as in `SpeechResult`."""

    code_agreement: Estimate
    first_code_agreement: Estimate
    code_kl_mean: Estimate
    later_code_agreement: Estimate | None = None
    later_code_kl_mean: Estimate | None = None
    drift: tuple[Estimate, ...]
    frames_ratio: float
    recognition: Recognition | None
    non_finite: int


class SpeechResult(Record):
    """Speech out: the same texts spoken by both sides, likeliest codes, same speaker.

    Attributes:
        utterances: texts spoken.
        frames: code frames of the reference, all utterances.
        code_agreement: share of the reference's codes that the model gives at the same frame and group, free-running.
        first_code_agreement: share of frames where the likeliest first code is the same, all of the reference's codes
            before it given; where a speech ends counts as a code.
        code_kl_mean: mean divergence of these first codes' distributions, in nats.
        later_code_agreement, later_code_kl_mean: the same of a frame's other codes, which the code predictor chooses; None
            in records that did not look at them, and where nothing was said.
        long_utterances: the longest one, and all that are at least half as long.
        drift: mean divergence in each quarter of these, in order of time.
        frames_ratio: frames of the model over those of the reference: whether it stops early or goes on.
        recognition: share of spoken digits that a classifier of real recordings hears, model and reference; None where no
            single digit was to be said.
        non_finite: utterances with a code distribution or a waveform that is not finite.
        floor: the same of the reference under the change of the noise floor; None if it was not run.
    """

    utterances: int
    frames: int
    code_agreement: Estimate
    first_code_agreement: Estimate
    code_kl_mean: Estimate
    later_code_agreement: Estimate | None = None
    later_code_kl_mean: Estimate | None = None
    long_utterances: int
    drift: tuple[Estimate, ...]
    frames_ratio: float
    recognition: Recognition | None
    non_finite: int
    floor: SpeechFloor | None


class LayerDifference(Record):
    """Hidden states after one decoder layer, the model's against the reference's, all samples.

    Attributes:
        layer: number of the layer, from 0.
        relative_error: ``|model - reference| / |reference|``, Euclidean over all values.
        cosine: mean cosine of the states of one position.
        routing_agreement: share of expert choices that are the same; None where the layer has no experts.
        floor: relative error of the reference under the change of the noise floor; None if it was not run.
        non_finite: positions of the model with a NaN or an infinity; they are in none of the other figures.
    """

    layer: int
    relative_error: float
    cosine: float
    routing_agreement: float | None
    floor: float | None
    non_finite: int


class Gate(Record):
    """A limit that was set, and what it met.

    Attributes:
        option: such as ``--max-kl``.
        limit: as set.
        value: the worst figure that it applies to.
        where: modality or task of that figure.
        verdict: pass or fail.
    """

    option: str
    limit: float
    value: float
    where: str
    verdict: Verdict


class EvaluationReceipt(Record):
    """The record of ``omnifp4 evaluate MODEL --against REFERENCE``.

    Attributes:
        model, against: folders.
        data: name or path of the data, and `data_sha256` of its samples and media.
        dtype, device, attention: of the arithmetic of both sides.
        segmented: sides that ran layer by layer from disk.
        noise_floor: what was changed between the two runs of the reference.
        distributions: ``full``, or which part of the vocabulary the divergence sees.
        reference_cached: samples of the reference that came from the cache.
        seed, resamples: of the bootstrap.
        layers: with ``--layers``, the comparison of hidden states, in place of all other results.
        peak_memory_bytes: largest resident size of the process.
    """

    receipt: str = "evaluation"
    version: int = RECEIPT_VERSION
    metric_version: int = METRIC_VERSION
    model: str
    against: str
    model_type: str
    data: str
    data_sha256: str
    samples: int
    dtype: str
    device: str
    attention: str
    segmented: tuple[str, ...]
    noise_floor: str
    distributions: str
    reference_cached: int
    seed: int
    resamples: int
    modalities: tuple[ModalityResult, ...]
    tasks: tuple[TaskResult, ...]
    speech: SpeechResult | None
    layers: tuple[LayerDifference, ...]
    gates: tuple[Gate, ...]
    notes: tuple[str, ...]
    verdict: Verdict
    seconds: float
    peak_memory_bytes: int
    environment: Environment


class HarnessResult(Record):
    """One metric of one lm-eval task.

    Attributes:
        task, metric: names in lm-eval; metric with its filter, such as ``acc,none``.
        value: as lm-eval gives it.
        standard_error: None where lm-eval gives none.
        samples: requests' documents of the task.
        higher_is_better: None where lm-eval does not say.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    samples: int | None
    higher_is_better: bool | None


class HarnessReceipt(Record):
    """The record of ``omnifp4 evaluate MODEL --lm-eval TASKS``.

    Attributes:
        model: folder, or the name that the server knows.
        server: address of an OpenAI-compatible server; None for the model loaded here.
        harness: lm-eval's version.
        results: every metric of every task.
        limit: documents of each task, None for all.
    """

    receipt: str = "harness"
    version: int = RECEIPT_VERSION
    model: str
    server: str | None
    harness: str
    tasks: tuple[str, ...]
    limit: int | None
    results: tuple[HarnessResult, ...]
    gates: tuple[Gate, ...]
    verdict: Verdict
    seconds: float
    environment: Environment
