"""What is shown of one sample in one decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnifp4.runtime.packed import NVFP4Linear, PackedExperts


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts a layer chose.

    Attributes:
        experts: int64 ``[tokens, k]``.
        weights: ``[tokens, k]``.
    """

    experts: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class LayerVisit:
    """One sample in one decoder layer. Tensors are on the layer's device and hold only until the callback returns.

    Attributes:
        layer, sample: numbers, from 0.
        name: checkpoint name of the layer, such as ``thinker.model.layers.3``.
        module: the layer with its weights; what a callback changes in it, the next sample sees.
        inputs: by checkpoint name: of each linear ``[tokens, in]``, and of the routed experts together
            (``….mlp.experts``) ``[tokens, hidden]``, which is also the router's input.
        routing: of a layer with experts.
        before, after: hidden states ``(1, tokens, hidden)``; `after` has the picture's features added that the model
            adds behind its first layers.
    """

    layer: int
    sample: int
    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    routing: Routing | None
    before: Tensor
    after: Tensor

    @property
    def experts(self) -> Any:
        """The module of the routed experts; None in a dense layer."""
        return getattr(getattr(self.module, "mlp", None), "experts", None)

    def expert_inputs(self, expert: int) -> Tensor:
        """Input of one expert's gate and up projections, ``[tokens routed to it, hidden]``."""
        assert self.routing is not None
        tokens = (self.routing.experts == expert).any(dim=-1)
        return self.inputs[f"{self.name}.mlp.experts"][tokens]

    def expert_inner(self, expert: int, inputs: Tensor | None = None) -> Tensor:
        """Input of one expert's down projection, ``[tokens, inner]``.

        Args:
            expert: its number.
            inputs: ``[tokens, hidden]``; None takes the tokens that were routed to it.
        """
        x = self.expert_inputs(expert) if inputs is None else inputs
        experts = self.experts
        if isinstance(experts, PackedExperts):
            weight, activate = experts.backend.dequantize(experts.gate_up(expert), x.dtype), experts.activate
        else:
            weight, activate = experts.gate_up_proj[expert], experts.act_fn
        gate, up = nn.functional.linear(x, weight).chunk(2, dim=-1)
        inner: Tensor = activate(gate) * up
        return inner


class Watch:
    """Keeps the inputs of a layer's linears and experts while it runs."""

    def __init__(self, sources: Mapping[str, nn.Module]) -> None:
        """`sources` are modules by checkpoint name."""
        self._sources = sources
        self.inputs: dict[str, Tensor] = {}
        self.routing: Routing | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks sit on the modules inside."""
        hooks = [
            module.register_forward_pre_hook(self._keep(name), with_kwargs=True)
            for name, module in self._sources.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def clear(self) -> None:
        """Forget the last sample."""
        self.inputs, self.routing = {}, None

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(module: nn.Module, values: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = values[0] if values else next(value for value in named.values() if isinstance(value, torch.Tensor))
            self.inputs[name] = x.detach().reshape(-1, x.shape[-1])
            if not isinstance(module, nn.Linear | NVFP4Linear):
                experts, weights = values[1:3] if len(values) > 2 else (named["top_k_index"], named["top_k_weights"])
                self.routing = Routing(experts, weights)

        return keep
