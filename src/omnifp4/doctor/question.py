"""The question that engines are asked, and a judgement in the making."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from omnifp4.doctor.facts import Facts
from omnifp4.doctor.packages import Installed
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.doctor import Ability, Concern, Fit, Machine
from omnifp4.receipt.verification import Check

CAN, CANNOT, NOT_KNOWN = Ability.CAN, Ability.CANNOT, Ability.NOT_KNOWN


@dataclass(frozen=True)
class Question:
    """One checkpoint on one machine.

    Attributes:
        path: as the person wrote it.
        checks: structural ones.
        device_memory: bytes of a GPU that one asks about; None: the machine's own.
        concerns: how it is about to be misused.
    """

    path: str
    facts: Facts
    checks: tuple[Check, ...]
    machine: Machine
    installed: Installed
    fit: Fit | None
    device_memory: int | None = None
    concerns: tuple[Concern, ...] = ()

    @property
    def argument(self) -> str:
        """The path as a shell takes it."""
        return shlex.quote(self.path)

    def broken(self, *, memory_names: bool = False) -> str:
        """What is wrong with its tensors, for any engine, or for one that reads the names of Transformers in memory."""
        wrong = ["files.", "fp4.present", "config.scheme", "scales."]
        if not (memory_names and self.facts.has_memory_names):
            wrong.append("tensors.")
        found = (c for c in self.checks if c.verdict is Verdict.FAIL and c.name.startswith(tuple(wrong)))
        return next((check.summary for check in found), "")

    @property
    def capability(self) -> str:
        """Compute capability of the first GPU."""
        return self.machine.accelerators[0].compute_capability if self.machine.accelerators else ""

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU that torch can use, or one that is asked about."""
        return bool(self.machine.accelerators) or self.device_memory is not None

    @property
    def is_thor(self) -> bool:
        """Whether this is a Jetson Thor."""
        return self.capability.startswith("11.") or any("Thor" in gpu.name for gpu in self.machine.accelerators)


@dataclass
class Judgement:
    """A judgement in the making: it only ever gets worse."""

    ability: Ability = CAN
    reasons: list[str] = field(default_factory=list)
    fix: str = ""

    def say(self, ability: Ability, reason: str, fix: str = "") -> None:
        """Add a reason; the worst ability counts, and its reasons come first."""
        order = (CAN, NOT_KNOWN, CANNOT)
        if order.index(ability) > order.index(self.ability):
            self.ability, self.fix = ability, fix
            self.reasons.insert(0, reason)
        else:
            self.fix = self.fix or fix
            self.reasons.append(reason)
