"""The record of a hand-over to another engine: what was run, which kernels it really used, and what it answered."""

from __future__ import annotations

from typing import Final

from omnifp4.receipt.base import Environment, Record, Verdict

HANDOVER_VERSION: Final = 1
"""Raised when a field of this record changes its meaning or goes away."""


class KernelUse(Record):
    """A kernel that the engine's own log names.

    Attributes:
        part: experts, linears or attention.
        kernel: as the log names it.
        arithmetic: what that is, such as W4A16; empty if not known.
        slow: emulation, or a fall-back of another kind.
        line: of the log.
    """

    part: str
    kernel: str
    arithmetic: str
    slow: bool
    line: str


class StageMemory(Record):
    """What one process of the engine said of its GPU memory; None: it said nothing.

    Attributes:
        weights_gib: of loaded weights.
        cache_gib: of key/value cache.
        cache_tokens: that the cache holds.
    """

    stage: str
    weights_gib: float | None = None
    cache_gib: float | None = None
    cache_tokens: int | None = None


class SmokeResult(Record):
    """One small request.

    Attributes:
        kind: text, image, audio, video or speech.
        detail: what came back, or what went wrong, or why it was not sent.
        tokens_per_s: of the answer after its first token, one request alone; None where it is too short.
        speech_rtf: seconds from sending to the last sound over the seconds of sound.
    """

    kind: str
    verdict: Verdict
    detail: str
    seconds: float
    first_token_s: float | None = None
    tokens: int = 0
    tokens_per_s: float | None = None
    speech_rtf: float | None = None


class HandoverReceipt(Record):
    """The record of ``omnifp4 serve --engine vllm`` or ``vllm-omni``.

    Attributes:
        model: as it was given.
        served: what the engine was given: the same, or a converted copy.
        converted_because: why it was converted; empty if it was not.
        versions: of the engine's environment.
        command: as one types it, without secrets.
        reasons: for what stands in the command.
        start_s: until it was healthy.
        gpu_bytes: in use on all GPUs, as the driver says; 0 if unknown.
    """

    receipt: str = "handover"
    version: int = HANDOVER_VERSION
    model: str
    served: str
    converted_because: str
    engine: str
    versions: dict[str, str]
    python: str
    command: str
    files: dict[str, str]
    reasons: tuple[str, ...]
    url: str
    start_s: float
    kernels: tuple[KernelUse, ...]
    memory: tuple[StageMemory, ...]
    gpu_bytes: int
    smoke: tuple[SmokeResult, ...]
    verdict: Verdict
    environment: Environment
