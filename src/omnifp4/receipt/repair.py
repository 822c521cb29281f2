"""The record of a repair: what was found, what was done about each, and what could not be mended."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record


class RepairOutcome(StrEnum):
    """How a repair ended."""

    NOTHING_TO_MEND = "nothing to mend"
    """No damage was found, and no OUT was made."""
    MENDED = "mended"
    """OUT was made."""
    NOT_MENDED = "not mended"
    """Something cannot be mended, and no OUT was made."""


class Effect(StrEnum):
    """What a mend does to the weights that an engine sees."""

    NONE = "none"
    """Every weight decodes to what it decoded to, or the mend is not about weights."""
    RESTORED = "restored"
    """The weights are what they should be: copied from the original, or freed of damage that hid them."""
    RECOMPUTED = "recomputed"
    """The weights were encoded anew from the original."""
    ROUNDED = "rounded"
    """The weights were rounded a second time; `Mend.relative_squared_error` says what that added."""
    ESTIMATED = "estimated"
    """A lost number was replaced by a guess; the original would give the right one."""


class Mend(Record):
    """One damage that can be mended, and how.

    Attributes:
        kind: stable identifier, such as ``scales.shared``.
        subject: the tensor, linear, file or place in the config.
        problem: what is wrong, as a clause.
        action: what is done about it, as a clause.
        effect: on the weights.
        relative_squared_error: for `Effect.ROUNDED`, of the new weights against the old; for `Effect.RECOMPUTED`,
            against the original; otherwise None.
    """

    kind: str
    subject: str
    problem: str
    action: str
    effect: Effect = Effect.NONE
    relative_squared_error: float | None = None


class Unmended(Record):
    """One damage that cannot be mended.

    Attributes:
        kind: stable identifier.
        subject: the tensor, linear, file or place in the config.
        problem: what is wrong, as a clause.
        needs: what would mend it.
    """

    kind: str
    subject: str
    problem: str
    needs: str


class RepairReceipt(Record):
    """The record of ``omnifp4 repair``.

    Attributes:
        artifact: folder name of what was repaired, never a path.
        original: folder name of the original wide checkpoint; None if none was given.
        dialect: of the tensors.
        activations: ``W4A16`` or ``W4A4``, as repaired.
        mended: every damage that was, or could be, mended.
        unmended: every damage that stays; if there is one, no OUT was made.
        weight_bytes: of all shard files written; 0 where no OUT was made.
        shards: bytes of each shard file.
        tensors: CRC-32 of the bytes of every stored tensor, by name.
        resumed_units: units of work that an earlier run had finished.
        seconds: of the last run.
    """

    receipt: str = "repair"
    version: int = RECEIPT_VERSION
    artifact: str
    original: str | None
    model_type: str
    dialect: str
    activations: str
    outcome: RepairOutcome
    mended: tuple[Mend, ...]
    unmended: tuple[Unmended, ...]
    weight_bytes: int = 0
    shards: dict[str, int] = Field(default_factory=dict)
    tensors: dict[str, int] = Field(default_factory=dict)
    resumed_units: int = 0
    seconds: float
    environment: Environment
