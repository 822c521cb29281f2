"""What the model's own modules say to the tokens of an engine: logits under the same history, and the routing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnifp4.benchmark.roofline import expert_modules
from omnifp4.runtime.backends.torch_ops import TorchBackend
from omnifp4.runtime.packed import PackedModule


@dataclass(frozen=True)
class Continuation:
    """A prompt and what an engine made of it: ids int64 ``[tokens]`` on the device, and its new tokens."""

    prompt: Tensor
    tokens: tuple[int, ...]


class Reference:
    """One forward of Transformers' modules with plain torch arithmetic over prompts and new tokens together.

    Shorter sequences are padded behind their end, where a causal model does not look.
    """

    def __init__(self, model: Any, sequences: Sequence[Continuation]) -> None:
        """Runs the forward; nothing of it is in the model afterwards."""
        self.sequences = list(sequences)
        self._head = model.thinker.lm_head
        longest = max(one.prompt.numel() + len(one.tokens) for one in sequences)
        ids = torch.zeros((len(sequences), longest), dtype=torch.long, device=sequences[0].prompt.device)
        for row, one in enumerate(sequences):
            length = one.prompt.numel()
            ids[row, :length] = one.prompt
            ids[row, length : length + len(one.tokens)] = ids.new_tensor(one.tokens)
        self._chosen: list[Tensor] = []
        """For each layer the experts that the tokens chose, ``[sequences, longest, k]``."""
        with torch.no_grad(), plain_arithmetic(model), self._recording(model, ids.shape):
            self._states: Tensor = model.thinker.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    @contextmanager
    def _recording(self, model: Any, shape: torch.Size) -> Iterator[None]:
        def keep(_: Any, values: tuple[Any, ...], named: dict[str, Any]) -> None:
            index = values[1] if len(values) > 1 else named["top_k_index"]
            self._chosen.append(index.view(*shape, -1).to(torch.int16))

        with ExitStack() as stack:
            for module in expert_modules(model):
                hook = module.register_forward_pre_hook(keep, with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def logits(self, row: int) -> Tensor:
        """Float32 ``[new tokens, vocabulary]``: those from which each new token of a sequence should have come."""
        one = self.sequences[row]
        first = one.prompt.numel() - 1
        with torch.no_grad():
            made: Tensor = self._head(self._states[row, first : first + len(one.tokens)])
        return made.float()

    def distinct_experts(self, rows: Sequence[int], experts: int) -> float | None:
        """Mean number of experts a layer that one decode step of these sequences reads; None without experts.

        Steps are aligned by their number, as an engine runs them.
        """
        steps = max(1, min(len(self.sequences[row].tokens) for row in rows) - 1)
        counts: list[Tensor] = []
        for chosen in self._chosen:
            seen = torch.zeros((steps, experts), dtype=torch.bool, device=chosen.device)
            for row in rows:
                begin = self.sequences[row].prompt.numel()
                seen.scatter_(1, chosen[row, begin : begin + steps].long(), True)
            counts.append(seen.sum(1).float().mean())
        return float(torch.stack(counts).mean()) if counts else None


@contextmanager
def plain_arithmetic(model: Any) -> Iterator[None]:
    """Packed weights are unpacked with torch operations inside, whatever backend they have: no kernel of ours."""
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    before = [module.requested_backend for module in modules]
    for module in modules:
        module.requested_backend = TorchBackend.name
    try:
        yield
    finally:
        for module, backend in zip(modules, before, strict=True):
            module.requested_backend = backend
