"""Draws tokens from logits as Transformers does, with random numbers of one's own."""

from __future__ import annotations

from typing import Any

from omnifp4.decoding.engine import DecodingError, Sampling


class Sampler:
    """Picks the tokens of one sequence, in the order of steps that ``generate()`` uses."""

    def __init__(self, sampling: Sampling, device: Any) -> None:
        """`device` is that of the logits; the same seed draws the same tokens on devices of one kind."""
        import torch
        from transformers.generation import logits_process as steps

        self._steps: list[Any] = []
        if sampling.repetition_penalty != 1:
            self._steps.append(steps.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        if sampling.temperature:
            if sampling.temperature != 1:
                self._steps.append(steps.TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._steps.append(steps.TopKLogitsWarper(int(sampling.top_k)))
            if sampling.top_p < 1:
                self._steps.append(steps.TopPLogitsWarper(float(sampling.top_p)))
        self._random = torch.Generator(device).manual_seed(sampling.seed) if sampling.temperature else None

    def pick(self, ids: Any, logits: Any) -> int:
        """The next token; `ids` has shape ``(1, tokens)``, `logits` ``(1, vocabulary)`` in float32.

        Raises:
            DecodingError: the logits are not numbers.
        """
        import torch

        if not bool(torch.isfinite(logits.max())):
            raise damaged(ids.shape[1])
        for step in self._steps:
            logits = step(ids, logits)
        if self._random is None:
            return int(logits.argmax())
        return int(torch.multinomial(logits.softmax(-1)[0], 1, generator=self._random))


def damaged(tokens: int) -> DecodingError:
    """What to say when the logits after so many tokens are not numbers."""
    return DecodingError(
        f"the model's output is not finite after {tokens} tokens: its weights are damaged", hint="omnifp4 verify MODEL"
    )
