"""The record of a script that ran under watch."""

from __future__ import annotations

from enum import StrEnum

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record
from omnifp4.receipt.doctor import Fit, Severity


class Outcome(StrEnum):
    """How the script ended."""

    ENDED = "ended"
    FAILED = "failed"
    STALLED = "stalled"
    TIMED_OUT = "timed out"
    KILLED = "killed"


class Explanation(Record):
    """One thing that went wrong, and what to do.

    Attributes:
        rule: stable identifier, such as ``prompt.no-roles``.
        title: what happened, in one line.
        cause: why.
        evidence: what was seen, one line each.
        fix: what to change, as code where that is shorter.
    """

    rule: str
    severity: Severity
    title: str
    cause: str
    evidence: tuple[str, ...]
    fix: str


class CatCount(Record):
    """Calls of ``torch.cat``: in all, with an empty list, and where the last of those was made."""

    calls: int = 0
    empty: int = 0
    place: str = ""


class CallCount(Record):
    """Outermost calls of a model's forward: how many, how many raised, and with what."""

    model: str
    calls: int
    failed: int
    messages: dict[str, int]


class LoadRecord(Record):
    """One ``from_pretrained``."""

    loader: str
    path: str
    arguments: dict[str, str]
    seconds: float | None
    result: str
    error: str


class GenerateRecord(Record):
    """One ``generate``.

    Attributes:
        roles: role markers found in the prompt, in order: names, or token ids where there is no name for them.
        tokens: length of the prompt.
        result: type of what came back.
    """

    model: str
    tokens: int
    roles: tuple[str, ...]
    arguments: dict[str, str]
    result: str
    error: str


class StructureReport(Record):
    """What the model in memory was made of.

    Attributes:
        attention: number of modules by class.
        dtypes: bytes of parameters and buffers by dtype.
        quantized_parameters: parameters that are packed, or that a quantizer rounds on the way.
        packed: whether the quantized ones take less memory; False: rounded at each use, stored wide.
    """

    model: str
    modules: int
    parameters: int
    attention: dict[str, int]
    dtypes: dict[str, int]
    quantized_parameters: int
    quantized_share: float
    packed: bool


class DiagnosisReceipt(Record):
    """The record of ``omnifp4 diagnose``.

    Attributes:
        healthy: it ended well and no problem was found; otherwise the exit status is 1.
        error: type and message of what ended it.
        stack: innermost Python frames at the end, or where it stood still.
        output_tail: the last lines that it printed.
    """

    receipt: str = "diagnosis"
    version: int = RECEIPT_VERSION
    script: str
    arguments: tuple[str, ...]
    outcome: Outcome
    exit_status: int | None
    healthy: bool
    error: str
    seconds: float
    explanations: tuple[Explanation, ...]
    cat: CatCount
    calls: tuple[CallCount, ...]
    loads: tuple[LoadRecord, ...]
    generates: tuple[GenerateRecord, ...]
    structure: StructureReport | None
    fit: Fit | None
    stack: tuple[str, ...]
    output_tail: tuple[str, ...]
    environment: Environment
