"""What a repair finds, gathered while it looks: damage that it can mend, and damage that it cannot."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from omnifp4.receipt.repair import Effect, Mend, Unmended

NEEDS_SOURCE = "the original weights: repeat with --source ORIGINAL"


class Ledger:
    """The findings of one repair, in the order in which they were made."""

    def __init__(self) -> None:
        self.mended: list[Mend] = []
        self.unmended: list[Unmended] = []

    def mend(self, kind: str, subject: str, problem: str, action: str, effect: Effect = Effect.NONE) -> None:
        """Note damage that will be mended."""
        self.mended.append(Mend(kind=kind, subject=subject, problem=problem, action=action, effect=effect))

    def fail(self, kind: str, subject: str, problem: str, needs: str = NEEDS_SOURCE) -> None:
        """Note damage that cannot be mended."""
        self.unmended.append(Unmended(kind=kind, subject=subject, problem=problem, needs=needs))

    def withdraw(self, subjects: Collection[str]) -> None:
        """Take back the mends of these subjects: something else will be done to them."""
        self.mended = [mend for mend in self.mended if mend.subject not in subjects]

    def with_errors(self, errors: dict[str, float]) -> Iterable[Mend]:
        """The mends, with the error of each linear (by module) that was rounded or recomputed."""
        for mend in self.mended:
            if mend.subject in errors and mend.effect in (Effect.ROUNDED, Effect.RECOMPUTED):
                yield mend.model_copy(update={"relative_squared_error": errors[mend.subject]})
            else:
                yield mend
