"""The record of a search for the schemes that a model's speech bears."""

from __future__ import annotations

from typing import Any

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record
from omnifp4.receipt.evaluation import SpeechFloor


class SpeechTrial(Record):
    """The model's speech with some of its linears rounded, against its own with all of them wide.

    Attributes:
        name: of the component, or in words what was rounded together.
        schemes: by component.
        parameters: that were rounded.
        bytes_before, bytes_after: of their weights, codes and scales.
        speech: figures as of a noise floor.
        exceeds: limits that it is beyond, in words; empty where speech bears it.
    """

    name: str
    schemes: dict[str, str]
    parameters: int
    bytes_before: int
    bytes_after: int
    speech: SpeechFloor
    exceeds: tuple[str, ...]


class SpeechSearchReceipt(Record):
    """The record of ``omnifp4 speech-recipe MODEL FILE``.

    Attributes:
        model, model_type: the wide checkpoint.
        data, data_sha256: of the samples whose answers were spoken.
        utterances, frames, long_utterances: as in an evaluation.
        base: recipe of the thinker.
        rule: of all scales.
        times_floor: a divergence up to so many times that of the noise floor is borne.
        floor: the wide model's speech under another attention.
        trials: each component in each scheme alone, in the order of the layout.
        base_alone: the base recipe with all that speaks wide.
        together: what was tried together, the last with what was chosen.
        with_base: that and the base recipe; None where nothing was chosen.
        chosen: scheme by component; what is not named stays wide.
        recipe: as ``--recipe FILE.json`` takes it.
    """

    receipt: str = "speech-search"
    version: int = RECEIPT_VERSION
    model: str
    model_type: str
    data: str
    data_sha256: str
    utterances: int
    frames: int
    long_utterances: int
    base: str
    rule: str
    times_floor: float
    floor: SpeechFloor
    trials: tuple[SpeechTrial, ...]
    base_alone: SpeechTrial
    together: tuple[SpeechTrial, ...]
    with_base: SpeechTrial | None
    chosen: dict[str, str]
    recipe: dict[str, Any]
    device: str
    seed: int
    seconds: float
    environment: Environment
