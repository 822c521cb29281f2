"""The records of a calibration set and of the statistics collected with it."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record

STATISTICS_VERSION: Final = 2
"""Raised when a tensor or a key of a statistics file, or a model's fingerprint, changes its name, form or meaning."""

SET_VERSION: Final = 1
"""Raised when a calibration set's files change their form."""


class Cause(StrEnum):
    """Why a sample failed."""

    MEDIA = "missing or damaged media"
    PROMPT = "wrong prompt"
    FORWARD = "wrong forward"
    NUMBERS = "activations that are not finite"


class SampleFailure(Record):
    """One sample that could not be used, or not to the end.

    Attributes:
        sample: its name in the data.
        cause: what kind of failure.
        layer: decoder layer in which it failed, from 0; None before the first and in the talker.
        error: what was raised, in one line.
    """

    sample: str
    cause: Cause
    layer: int | None
    error: str


class ExpertTokens(Record):
    """How often the experts of one layer were chosen.

    Attributes:
        experts: checkpoint name of the group, such as ``thinker.model.layers.0.mlp.experts``.
        tokens: routed to each expert.
        all_expert_tokens: that were given to every expert beside these.
        too_few: experts with fewer routed tokens than the threshold.
        data_free: those among them that the all-expert statistics do not help either.
    """

    experts: str
    tokens: tuple[int, ...]
    all_expert_tokens: int
    too_few: int
    data_free: int


class CalibrationReceipt(Record):
    """The record of ``omnifp4 calibrate``, kept in the statistics file's metadata.

    Attributes:
        model: folder name, never a path.
        model_fingerprint: of names, types, shapes and a sample of the weights; see `model_fingerprint`.
        data, data_sha256: what was read, and a digest of all sequences as the model read them.
        samples: sequences that went in, the failed ones among them.
        failures: of these.
        left_out: samples of a modality that the model does not read, by modality.
        tokens: of the samples that went through, by modality.
        least_tokens: an expert with fewer routed tokens takes the all-expert statistics; where these have fewer too,
            the expert has none, and a recipe takes its data-free rule.
        experts: by layer.
        components: whose linears have statistics, and how many linears each; an expert's projections count one by one.
        not_captured: components with linears that have none, and why.
        block_hessians: whether they were collected.
        gradient_positions: that squared gradients were summed over; 0 where they were not collected.
        dtype, device: of the arithmetic.
        tensors: CRC-32 of each tensor's bytes in the file.
        resumed_layers: decoder layers that an earlier run had done.
        seconds: of the last run.
    """

    receipt: str = "calibration"
    version: int = RECEIPT_VERSION
    statistics_version: int = STATISTICS_VERSION
    model: str
    model_type: str
    model_fingerprint: str
    data: str
    data_sha256: str
    samples: int
    failures: tuple[SampleFailure, ...]
    left_out: dict[str, int]
    tokens: dict[str, int]
    least_tokens: int
    experts: tuple[ExpertTokens, ...]
    components: dict[str, int]
    not_captured: dict[str, str]
    block_hessians: bool
    dtype: str
    device: str
    tensors: dict[str, int]
    resumed_layers: int
    seconds: float
    peak_memory_bytes: int
    environment: Environment
    gradient_positions: int = 0


class ModalityCount(Record):
    """Conversations of one modality in a set.

    Attributes:
        modality: ``text``, ``image``, ``audio``, ``video``, or ``mixed``.
        tokens: of these conversations, by what the tokens are: text, image, audio, video.
    """

    modality: str
    conversations: int
    tokens: dict[str, int]


class SetReceipt(Record):
    """The record of ``omnifp4 dataset``, kept in the set as dataset.json.

    Attributes:
        source: ``bundled``, or the file's name.
        conversations: how many there are.
        modalities: in parts.
        tokens: of all, by what they are.
        spoken: conversations whose answer is to be spoken too.
        counted_by: whose processor counted the tokens.
        seed: of the choice.
        files: SHA-256 of every file of the set, by its name in the set.
        sha256: of all of them together.
    """

    receipt: str = "dataset"
    version: int = RECEIPT_VERSION
    set_version: int = SET_VERSION
    source: str
    conversations: int
    modalities: tuple[ModalityCount, ...]
    tokens: dict[str, int]
    spoken: int
    counted_by: str
    seed: int
    files: dict[str, str]
    sha256: str
    environment: Environment
