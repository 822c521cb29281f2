"""The record of a sensitivity map: where in the model FP4 does harm."""

from __future__ import annotations

from typing import Final

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record
from omnifp4.receipt.evaluation import Estimate

SENSITIVITY_VERSION: Final = 1
"""Raised when a figure of the same model and data would come out otherwise."""


class SensitivityRow(Record):
    """One component, one layer of it, or one expert of that layer.

    Attributes:
        component: name, as ``--component`` takes it.
        layer: number from 0; None for the whole component.
        expert: number from 0; None for the whole layer.
        linears: that become FP4 in it.
        scheme: what they become, several joined by ``+``; empty in a map of an earlier version.
        parameters: of those.
        weight_error: ``sum((w - w')**2) / sum(w**2)`` over its linears.
        output_error: the same of the outputs of its linears, and of its experts as a whole, each fed with the inputs that
            it had in the run of the wide model; None if no token came there, or its inputs were not seen.
        tokens: outputs that this was summed over: tokens times linears, or times experts that they were routed to.
        kl_mean: divergence in nats of the wide model from the same with only this in FP4; None where it was not run,
            as for an expert that no token came to.
        share: of the sum of `kl_mean` over all rows of the same level that `kl_mean` is.
    """

    component: str
    layer: int | None
    expert: int | None
    linears: int
    parameters: int
    weight_error: float
    output_error: float | None
    tokens: int | None
    kl_mean: Estimate | None
    share: float | None
    scheme: str = ""


class SensitivityReceipt(Record):
    """The record of ``omnifp4 evaluate OUT --against MODEL --sensitivity``.

    Attributes:
        model, against: folders of the artifact and of what it was made from.
        against_fingerprint: of the weights of `against`, see `model_fingerprint`; empty in a map of an earlier version.
        recipe, rule: of the artifact, where its own receipt tells them.
        data, data_sha256, samples: as in an evaluation.
        positions: scored positions.
        noise_floor: mean divergence of the wide model from itself under another attention; None if it was not run.
        together: divergence with everything quantized at once: more or less than the sum of the parts.
        rows: components first, then their layers, then experts.
    """

    receipt: str = "sensitivity"
    version: int = RECEIPT_VERSION
    sensitivity_version: int = SENSITIVITY_VERSION
    model: str
    against: str
    model_type: str
    recipe: str
    rule: str
    data: str
    data_sha256: str
    samples: int
    positions: int
    dtype: str
    device: str
    noise_floor: float | None
    together: Estimate | None
    rows: tuple[SensitivityRow, ...]
    notes: tuple[str, ...]
    seconds: float
    environment: Environment
    against_fingerprint: str = ""
