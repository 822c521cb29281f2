"""What makes tokens: the interface; `omnifp4.decoding.choosing` says what stands behind it.

An engine holds the cache of every text under way on one model, and advances several of them together. It draws tokens
too, because a fast engine does that on the device. It knows nothing of end markers, stop strings and text: those are
the caller's business, who ends a sequence with `Engine.stop`.

::

    engine = choose_engine(model, most_sequences=8)
    one = engine.start(inputs, Sampling(), most_tokens=100)
    other = engine.start(more_inputs, Sampling(temperature=0.7, seed=1), most_tokens=20)
    engine.step()                      # both have two tokens now
    engine.stop(other)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from omnifp4.errors import OmniFP4Error

if TYPE_CHECKING:
    from torch import Tensor

    from omnifp4.chat.inputs import ModelInputs

ENGINES: Final = ("modules", "cuda-graph")
"""What `choose_engine` takes, beside ``auto``."""

EngineName = Literal["modules", "cuda-graph"]


class DecodingError(OmniFP4Error):
    """Text that cannot be made: damaged weights, no room, or an engine that does not fit model or machine."""


class EngineFull(DecodingError):
    """No place or no cache memory is left for one more sequence now; it may be when another one ends."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; everything is decided, no default of a checkpoint plays a part any more.

    Attributes:
        temperature: 0 takes the likeliest token, and `top_k` and `top_p` have no part then.
        top_k: candidates; 0 means all.
        top_p: nucleus.
        repetition_penalty: above 1 discourages tokens of prompt and text; it acts on greedy text too.
        seed: of this sequence's own random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(eq=False)
class Sequence:
    """One text under way.

    Attributes:
        prompt_tokens: length of the prompt.
        most_tokens: the most that may be made.
        tokens: made so far; `Engine.start` makes the first.
        states: hidden states of the prompt that the talker reads, ``(1, prompt_tokens, hidden)``; None if not kept.
    """

    prompt_tokens: int
    most_tokens: int
    tokens: list[int] = field(default_factory=list)
    states: Tensor | None = field(default=None, repr=False)


class Engine(ABC):
    """Makes tokens for several sequences of one model at once.

    `start` and `step` may be called from any thread, but one call runs at a time. `stop` returns at once and may come
    from any thread at any moment, also while a step runs and from the garbage collector: a sequence nobody holds any
    more is stopped by that.

    Attributes:
        name: ``modules`` or ``cuda-graph``.
        reason: why this one was chosen.
        most_sequences: that may be under way at once.
        context_tokens: the most tokens, prompt and new ones together, of one sequence.
    """

    name: EngineName
    reason: str
    most_sequences: int
    context_tokens: int

    @abstractmethod
    def start(
        self, inputs: ModelInputs, sampling: Sampling, *, most_tokens: int, keep_states: bool = False
    ) -> Sequence:
        """Reads a prompt and makes the first token.

        Args:
            inputs: a batch of one.
            sampling: how its tokens are drawn.
            most_tokens: the most that will be made; room for them is taken now, so that a later step never lacks it.
            keep_states: keep the hidden states that the talker reads.

        Raises:
            EngineFull: no place or no cache memory is left; nothing has changed.
            DecodingError: it can never fit, or the logits are not numbers.
        """

    @abstractmethod
    def step(self, sequences: Iterable[Sequence] | None = None) -> None:
        """Makes one more token for each sequence given, or for every one under way.

        Raises:
            DecodingError: a sequence is not under way or has all its tokens, or logits are not numbers.
        """

    @abstractmethod
    def stop(self, sequence: Sequence) -> None:
        """Frees the place of a sequence; its tokens and states stay. Nothing happens if it was free already."""

    @abstractmethod
    def close(self) -> None:
        """Stops everything and gives the memory back; the engine takes no sequence any more."""

    def check_room(self, inputs: ModelInputs, most_tokens: int) -> None:
        """Refuses what can never fit.

        Raises:
            DecodingError: prompt and new tokens are more than the context, or there is no token to make.
        """
        if most_tokens < 1:
            raise DecodingError(f"most_tokens is {most_tokens}", hint="a sequence has one token at least")
        if inputs.prompt_tokens + most_tokens > self.context_tokens:
            raise DecodingError(
                f"the prompt has {inputs.prompt_tokens} tokens and the text may have {most_tokens}, together more than "
                f"the engine's context of {self.context_tokens}",
                hint="shorten the conversation or lower the number of new tokens",
            )
