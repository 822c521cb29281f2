"""The record of an examination: this machine, this checkpoint, and what can run it."""

from __future__ import annotations

from enum import StrEnum

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record
from omnifp4.receipt.verification import Check


class Ability(StrEnum):
    """Whether something can be run."""

    CAN = "can"
    CANNOT = "cannot"
    NOT_KNOWN = "not known"


class Severity(StrEnum):
    """How much a concern matters."""

    PROBLEM = "problem"
    """It goes wrong, or already did."""
    NOTE = "note"
    """Worth knowing; nothing fails."""


class Tool(Record):
    """An installed program or Python package; `version` is empty where it is not installed."""

    name: str
    version: str
    note: str = ""


class Accelerator(Record):
    """One GPU.

    Attributes:
        free_bytes: not in use by anybody now; None if unknown.
        compute_capability: such as ``9.0``; empty if unknown.
    """

    name: str
    memory_bytes: int
    free_bytes: int | None = None
    compute_capability: str = ""
    driver: str = ""


class Machine(Record):
    """Where the model would run.

    Attributes:
        ram_bytes: of the machine, or of the container it is limited to.
        ram_free_bytes: that can be had without swapping.
        torch_build: such as ``CUDA 13.0`` or ``CPU``; empty without torch.
        torch_problem: why torch sees no GPU although there is one, or does not start.
    """

    python: str
    system: str
    machine: str
    cores: int
    ram_bytes: int
    ram_free_bytes: int
    torch_build: str
    torch_problem: str
    accelerators: tuple[Accelerator, ...]


class Concern(Record):
    """Something about a checkpoint or its environment that is, or is about to be, misused."""

    name: str
    severity: Severity
    finding: str
    fix: str = ""


class EngineRow(Record):
    """One engine.

    Attributes:
        ability: whether it can run this checkpoint on this machine, as it is installed now.
        artifact: whether it reads this checkpoint rightly at all, wherever it runs.
        original: whether it reads the same model unquantized.
        scenario: A: reads both; B: reads the original, not this checkpoint; C: reads neither; empty if not known.
        version: installed one; empty if it is not installed.
        reasons: why, the deciding one first.
        fix: what would make it run; empty if it does.
        command: the exact command to run it.
    """

    engine: str
    ability: Ability
    artifact: Ability
    original: Ability
    scenario: str
    version: str
    reasons: tuple[str, ...]
    fix: str
    command: str


class FitRow(Record):
    """What fits for one set of loaded parts, one device and one batch.

    Attributes:
        loaded: parts of the model in memory.
        weight_bytes: of exactly those parts, from the headers.
        device_bytes: free memory that was counted on.
        most_tokens: longest context for each sequence of the batch; 0 if the weights alone do not fit.
        needed_bytes: with that context, or for the weights alone where it is 0.
    """

    loaded: str
    device: str
    device_bytes: int
    weight_bytes: int
    batch: int
    most_tokens: int
    needed_bytes: int


class TierRow(Record):
    """How small a set of loaded parts is.

    Attributes:
        tier: which of the usual aims it meets.
        smallest_device_gb: smallest usual memory size on which it runs with 4,096 tokens; 0 if none does.
    """

    loaded: str
    weight_bytes: int
    tier: str
    smallest_device_gb: int


class Fit(Record):
    """Memory needs, and what fits.

    Attributes:
        kv_bytes_per_token: of the text decoder's cache, per sequence, in BF16.
        speech_bytes_per_token: what speech adds for each token of context.
        activation_bytes_per_token: estimate for the prefill, per token of the prompt.
        rule: how the estimate is made, one line each.
    """

    kv_bytes_per_token: int
    speech_bytes_per_token: int
    activation_bytes_per_token: int
    model_context: int
    rule: tuple[str, ...]
    rows: tuple[FitRow, ...]
    tiers: tuple[TierRow, ...]


class CheckpointSummary(Record):
    """What the checkpoint is, from its headers.

    Attributes:
        kind: nvfp4, wide, amax-only, fake-quant, claim-only, other or broken.
        dialect: of the quantization; empty for a wide checkpoint.
        activations: W4A16, W4A4 or wide.
        fp4_share: parameters stored as FP4 over all.
        sound: verdict of the structural checks: none failed.
    """

    model: str
    model_type: str
    kind: str
    dialect: str
    activations: str
    weight_bytes: int
    parts: dict[str, int]
    fp4_share: float
    sound: bool
    checks: tuple[Check, ...]


class DoctorReceipt(Record):
    """The record of ``omnifp4 doctor``.

    Attributes:
        can_run: False only if a MODEL was given and nothing here can run it; then the exit status is 1.
        verdict: one line.
    """

    receipt: str = "doctor"
    version: int = RECEIPT_VERSION
    model: str | None
    can_run: bool
    verdict: str
    machine: Machine
    tools: tuple[Tool, ...]
    environment_concerns: tuple[Concern, ...]
    checkpoint: CheckpointSummary | None
    concerns: tuple[Concern, ...]
    engines: tuple[EngineRow, ...]
    fit: Fit | None
    seconds: float
    environment: Environment
