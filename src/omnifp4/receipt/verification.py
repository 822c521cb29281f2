"""The record of a proof."""

from __future__ import annotations

from pydantic import Field

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record, Verdict


class Check(Record):
    """One thing that was checked.

    Attributes:
        name: stable identifier, such as ``scales.shared``.
        title: what it checks, for people.
        verdict: pass, fail or not checked.
        summary: one line: what was found, with counts.
        findings: what is wrong, one line each, the worst first; at most a few dozen.
        finding_count: how many there are in all.
        fix: the command or action that mends it; empty if it passed.
    """

    name: str
    title: str
    verdict: Verdict
    summary: str
    findings: tuple[str, ...] = ()
    finding_count: int = 0
    fix: str = ""


class TensorError(Record):
    """How far a dequantized linear is from the original.

    Attributes:
        name: checkpoint name of the weight in the wide checkpoint.
        relative_squared_error: ``sum((w - w')**2) / sum(w**2)``.
        max_abs_error: largest ``|w - w'|``.
    """

    name: str
    relative_squared_error: float
    max_abs_error: float


class VerificationReceipt(Record):
    """The record of ``omnifp4 verify``.

    Attributes:
        fp4_linears, fp4_parameters: in NVFP4 and MXFP4.
        schemes: how many linears each scheme has.
    """

    receipt: str = "verification"
    version: int = RECEIPT_VERSION
    artifact: str
    against: str | None
    dialect: str
    model_type: str
    activations: str
    verdict: Verdict
    checks: tuple[Check, ...]
    fp4_linears: int
    fp4_parameters: int
    schemes: dict[str, int] = Field(default_factory=dict)
    wide_parameters: int
    weight_bytes: int
    wide_equivalent_bytes: int
    compression_ratio: float
    relative_squared_error: float | None = None
    worst_tensors: tuple[TensorError, ...] = ()
    seconds: float
    environment: Environment
