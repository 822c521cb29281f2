"""The two transformers that make a frame of speech, one step at a time: the talker and its code predictor.

`ModuleSteps` calls Transformers' own models with their own growing caches: the reference, and equal to ``generate()``
bit for bit. `speech_fixed.FixedSteps` does the same on memory whose addresses never change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Steps(ABC):
    """Talker and code predictor with the state of one speech."""

    @abstractmethod
    def begin(self, talker: Any, prompt_cache: Any, shift: Tensor, tokens: int) -> None:
        """Starts a speech.

        Args:
            talker: Transformers' module.
            prompt_cache: keys and values of the prompt, a Transformers cache; the steps may keep and grow it.
            shift: what is added to an index in the cache to get its rotary position, int64 ``[1]``.
            tokens: in the prompt.
        """

    @abstractmethod
    def talk(self, talker: Any, embedding: Tensor) -> Tensor:
        """One token of the talker: ``[1, 1, H]`` to its last, normed hidden state ``[1, 1, H]``."""

    @abstractmethod
    def predict(self, talker: Any, embedding: Tensor, place: int) -> Tensor:
        """Some tokens of the code predictor, which starts anew at place 0: ``[1, n, H]`` to normed ``[1, n, H]``."""


class ModuleSteps(Steps):
    """Transformers' modules as they are."""

    def begin(self, talker: Any, prompt_cache: Any, shift: Tensor, tokens: int) -> None:
        """See `Steps.begin`."""
        self._cache = prompt_cache
        self._shift = shift
        self._place = tokens

    def talk(self, talker: Any, embedding: Tensor) -> Tensor:
        """See `Steps.talk`."""
        positions = (self._shift + self._place).view(1, 1, 1).expand(3, 1, 1)
        self._place += 1
        output = talker.model(
            inputs_embeds=embedding, position_ids=positions, past_key_values=self._cache, use_cache=True
        )
        return _last(output)

    def predict(self, talker: Any, embedding: Tensor, place: int) -> Tensor:
        """See `Steps.predict`."""
        if place == 0:
            self._predicted = None
        output = talker.code_predictor.model(inputs_embeds=embedding, past_key_values=self._predicted, use_cache=True)
        self._predicted = output.past_key_values
        return _last(output)

    _predicted: Any = None


def _last(output: Any) -> Tensor:
    states: Tensor = output.last_hidden_state
    return states


def read_prompt(talker: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any, Tensor]:
    """The talker's forward over its prompt.

    Args:
        talker: Transformers' module.
        inputs: as `Opening.inputs`.

    Returns:
        Logits of the last position, float32 ``[1, vocabulary]``; its hidden state ``[1, 1, H]``; the cache; and the
        shift of rotary positions, int64 ``[1]``.
    """
    with torch.no_grad():
        output = talker(**inputs, use_cache=True, output_hidden_states=True)
    hidden = output.hidden_states[0][-1][:, -1:]
    logits = output.logits[:, -1].to(copy=True, dtype=torch.float32)
    shift = talker.rope_deltas.reshape(1).to(device=hidden.device, dtype=torch.long)
    return logits, hidden, output.past_key_values, shift
