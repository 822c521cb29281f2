"""The record of a measurement: what was run where, what was checked first, and every figure with its spread."""

from __future__ import annotations

from enum import StrEnum

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record
from omnifp4.receipt.verification import Check


class TierVerdict(StrEnum):
    """Whether a tier is reached."""

    PASS = "pass"
    FAIL = "fail"
    NOT_MEASURED = "not measured"


class Spread(Record):
    """Repeats of one measurement.

    Attributes:
        median: of the repeats.
        least: smallest of them.
        most: largest of them.
        repeats: how many; what came before to warm up is not among them.
    """

    median: float
    least: float
    most: float
    repeats: int


class BenchMachine(Record):
    """Where it was measured.

    Attributes:
        device: name of the GPU, or of the processor.
        device_bytes: memory of the GPU; of the host for a processor.
        copy_bytes_per_second: of a large copy on that device in this run, bytes read and bytes written together.
        copied_bytes: read and written by one such copy.
        triton: empty where it is not installed.
    """

    device: str
    device_bytes: int
    cores: int
    copy_bytes_per_second: Spread
    copied_bytes: int
    torch: str
    transformers: str
    triton: str


class BenchSettings(Record):
    """What was asked for.

    Attributes:
        parts: of the model that are loaded: text, thinker or all.
        prefill: lengths of prompts in tokens.
        batch: numbers of sequences at once.
        context: lengths of the prompts before decoding, in tokens.
        new_tokens: tokens that each sequence makes in a repeat.
        repeats: of every measurement.
        cell_seconds: about how long the repeats of one figure may take; fewer tokens are made where they take longer.
        seed: of prompts and of synthetic weights.
    """

    engine: str
    parts: str
    prefill: tuple[int, ...]
    batch: tuple[int, ...]
    context: tuple[int, ...]
    new_tokens: int
    repeats: int
    cell_seconds: float
    seed: int


class BenchMemory(Record):
    """Memory of the device.

    Attributes:
        weights: bytes of parameters and buffers on the device, by part of the model.
        weight_bytes: of all of them.
        loading_peak_bytes: most in use at once while the model was loaded or made; None on a processor.
        peak_bytes: most in use at once while it was measured, caches included; None on a processor.
    """

    weights: dict[str, int]
    weight_bytes: int
    loading_peak_bytes: int | None
    peak_bytes: int | None


class PrefillRow(Record):
    """One length of prompt, one sequence.

    Attributes:
        first_token_seconds: from the prompt's ids to the first token on the host; None if not measured.
        tokens_per_second: of the prompt; None if not measured.
        not_measured: why; empty if it was.
    """

    prompt_tokens: int
    engine: str
    first_token_seconds: Spread | None
    tokens_per_second: Spread | None
    not_measured: str = ""


class DecodeRow(Record):
    """One batch at one context.

    Attributes:
        batch: sequences at once.
        prompt_tokens: of each sequence.
        new_tokens: that each sequence made in a repeat; fewer than asked for where time was short.
        mean_context: tokens that a step reads from the cache, mean over the steps measured.
        tokens_per_second: of all sequences together; None if not measured.
        step_bytes: that a step must read and write, see `Traffic`.
        bound_tokens_per_second: at the copy bandwidth of this run.
        fraction: of that bound, by the median.
        not_measured: why; empty if it was.
    """

    batch: int
    prompt_tokens: int
    engine: str
    new_tokens: int
    mean_context: float
    tokens_per_second: Spread | None
    step_bytes: int
    bound_tokens_per_second: float
    fraction: float | None
    not_measured: str = ""


class CacheRow(Record):
    """What a longer context costs, from two decode rows of one batch.

    Attributes:
        extra_bytes: that a step reads more of the cache.
        extra_seconds: that a step takes longer, by the medians.
        bytes_per_second: the one over the other; None if the longer context took no longer.
        fraction: of the copy bandwidth.
    """

    batch: int
    from_tokens: int
    to_tokens: int
    extra_bytes: int
    extra_seconds: float
    bytes_per_second: float | None
    fraction: float | None


class RoutingRow(Record):
    """Experts that a step reads.

    Attributes:
        distinct_experts: a layer and step, mean.
        uniform_experts: expectation if every token chose uniformly.
        measured: `distinct_experts` was counted in this run; otherwise it is that expectation.
        how: what was counted.
    """

    batch: int
    distinct_experts: float
    uniform_experts: float
    measured: bool
    how: str


class Traffic(Record):
    """Bytes that a decode step moves, counted from the loaded model.

    Attributes:
        always: read once a step: attention, routers, norms, head.
        expert: of one expert of one layer.
        layers: with experts.
        row: read for each sequence: its embedding.
        cache_token: of the cache for a token of context, read; a step writes one for each sequence.
    """

    always: int
    expert: int
    layers: int
    row: int
    cache_token: int


class SpeechRow(Record):
    """Speech of one stream: talker, code predictor and code2wav.

    Attributes:
        audio_seconds: that were made in a repeat, median.
        real_time_factor: seconds of work for a second of sound; below 1 is faster than it is heard.
        first_sound_seconds: from the text to the first samples.
        how: how the talker was run.
        not_measured: why; empty if it was.
    """

    audio_seconds: float
    real_time_factor: Spread | None
    first_sound_seconds: Spread | None
    how: str
    not_measured: str = ""


class Tier(Record):
    """One of the usual aims, judged for one sequence.

    Attributes:
        most_gib: the weights of the thinker path must take less than this many GiB.
        least_tokens_per_second: a single sequence must be decoded faster than this.
        gib: what they take.
        parts: what is loaded and counted in `gib`.
        tokens_per_second: median at batch 1 and the shortest context; None if not measured.
        reason: for the verdict.
    """

    name: str
    most_gib: float
    least_tokens_per_second: float
    gib: float
    parts: str
    tokens_per_second: float | None
    verdict: TierVerdict
    reason: str


class Measured(Record):
    """Everything about one model. Rows of speed are empty when a check failed.

    Attributes:
        model: folder, Hub id or synthetic shape.
        weights: ``NVFP4`` or ``BF16``, and what of it.
        layers: decoder layers of the thinker.
        engine_reason: why the engine was chosen.
        load_seconds: from files to the device; None for a synthetic model.
        make_seconds: of a synthetic model; None for a loaded one.
    """

    model: str
    weights: str
    layers: int
    engine: str
    engine_reason: str
    load_seconds: float | None
    make_seconds: float | None
    memory: BenchMemory
    checks: tuple[Check, ...]
    traffic: Traffic
    routing: tuple[RoutingRow, ...]
    prefill: tuple[PrefillRow, ...]
    decode: tuple[DecodeRow, ...]
    cache: tuple[CacheRow, ...]
    speech: SpeechRow | None
    tiers: tuple[Tier, ...]


class RatioRow(Record):
    """The model over its reference, by the medians; above 1 is better than the reference.

    Attributes:
        figure: what is compared.
        ratio: of speeds; for memory and seconds, of the reference over the model.
    """

    figure: str
    model: float
    reference: float
    ratio: float


class BenchReceipt(Record):
    """The record of ``omnifp4 bench``.

    Attributes:
        passed: no check failed; a model with a failed check has no figure of speed, and the exit status is 1.
        against: the second model, measured in the same run after the first was freed; None too where the first failed.
    """

    receipt: str = "bench"
    version: int = RECEIPT_VERSION
    passed: bool
    machine: BenchMachine
    settings: BenchSettings
    model: Measured
    against: Measured | None
    ratios: tuple[RatioRow, ...]
    seconds: float
    environment: Environment
