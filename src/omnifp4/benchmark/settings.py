"""What is to be measured, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from omnifp4.errors import OmniFP4Error

PARTS: Final = ("text", "thinker", "all")
"""What of an omni model is loaded: the text decoder alone, the towers too, or speech too."""

LEAST_REPEATS: Final = 3
MOST_BATCH: Final = 1024
CHECK_TOKENS: Final = 16
"""New tokens of each sequence in the check before the timing."""
WARM_STEPS: Final = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """One run of the bench.

    Attributes:
        prefill: lengths of prompts whose first token is timed.
        batch: numbers of sequences at once.
        context: lengths of prompts before decoding.
        new_tokens: that each sequence makes in a repeat.
        repeats: of every measurement, warm-up apart.
        engine: as `omnifp4.decoding.choose_engine` takes it.
        against_engine: likewise, for the reference.
        parts: of `PARTS`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        seed: of prompts and synthetic weights.
        cell_seconds: about how long the repeats of one figure may take; reading the prompts before them, twice that.
        speech_seconds: sound that is made in a repeat.

    Raises:
        OmniFP4Error: a value that cannot be measured.
    """

    prefill: tuple[int, ...] = (64, 2048)
    batch: tuple[int, ...] = (1, 8, 32)
    context: tuple[int, ...] = (64, 4096, 16384)
    new_tokens: int = 256
    repeats: int = 3
    engine: str = "auto"
    against_engine: str = "auto"
    parts: str = "thinker"
    device: str = "auto"
    seed: int = 0
    cell_seconds: float = 15.0
    speech_seconds: float = 8.0

    def __post_init__(self) -> None:
        """Checks every value."""
        from omnifp4.decoding.engine import ENGINES

        for name in ("prefill", "batch", "context"):
            values = getattr(self, name)
            if not values or any(type(value) is not int or value < 1 for value in values):
                raise OmniFP4Error(f"{name} is {values!r}", hint="whole numbers from 1, such as 1,8,32")
            if list(values) != sorted(set(values)):
                raise OmniFP4Error(f"{name} is {values!r}", hint="each number once, the smallest first")
        if self.batch[-1] > MOST_BATCH:
            raise OmniFP4Error(f"batch is {self.batch[-1]}", hint=f"at most {MOST_BATCH}")
        if self.new_tokens < CHECK_TOKENS:
            raise OmniFP4Error(f"new_tokens is {self.new_tokens}", hint=f"at least {CHECK_TOKENS}")
        if self.repeats < LEAST_REPEATS:
            raise OmniFP4Error(f"repeats is {self.repeats}", hint=f"at least {LEAST_REPEATS}, or there is no spread")
        if self.parts not in PARTS:
            raise OmniFP4Error(f"parts is {self.parts!r}", hint=f"allowed: {', '.join(PARTS)}")
        for engine in (self.engine, self.against_engine):
            if engine not in ("auto", *ENGINES):
                raise OmniFP4Error(f"there is no engine {engine!r}", hint=f"allowed: auto, {', '.join(ENGINES)}")
        if self.cell_seconds <= 0 or self.speech_seconds <= 0:
            raise OmniFP4Error("cell_seconds and speech_seconds must be above 0")

    def decode_tokens(self, context: int) -> int:
        """Tokens that a sequence needs room for, warm-up and the first token included."""
        return context + self.new_tokens + WARM_STEPS + 1

    def check_context(self, most: int) -> None:
        """Refuse what is longer than the model's context.

        Raises:
            OmniFP4Error: with the longest that fits.
        """
        if self.decode_tokens(self.context[-1]) > most:
            raise OmniFP4Error(
                f"a context of {self.context[-1]:,} and {self.new_tokens} new tokens do not fit the model's {most:,}",
                hint=f"--context up to {max(0, most - self.decode_tokens(0)):,}",
            )
        if self.prefill[-1] + WARM_STEPS > most:
            raise OmniFP4Error(
                f"a prompt of {self.prefill[-1]:,} tokens does not fit the model's {most:,}",
                hint=f"--prefill up to {max(0, most - WARM_STEPS):,}",
            )


def parse_numbers(values: str | Iterable[int], option: str) -> tuple[int, ...]:
    """``1,8,32``, or numbers, in order and each once.

    Raises:
        OmniFP4Error: something else.
    """
    try:
        return tuple(sorted({int(part) for part in (values.split(",") if isinstance(values, str) else values)}))
    except (ValueError, TypeError):
        raise OmniFP4Error(
            f"{option} is {str(values)[:60]!r}", hint="whole numbers with commas, such as 1,8,32"
        ) from None
