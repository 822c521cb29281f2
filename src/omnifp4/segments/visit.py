"""What is shown of one sample in one decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnifp4.errors import OmniFP4Error
from omnifp4.runtime.coded import SchemeExperts, SchemeLinear, decode
from omnifp4.runtime.packed import NVFP4Linear, PackedExperts


class SampleError(OmniFP4Error):
    """Raised by a visitor: this sample is no good, and the others may go on without it."""


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
        modules: of the same names.
        routing: of a layer with experts.
        before, given, after: hidden states ``(1, tokens, hidden)``: what the layer reads; what it gives; and this with the
            picture's features that the model adds behind its first layers.
        named: keyword arguments that the layer was run with.
    """

    layer: int
    sample: int
    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    routing: Routing | None
    before: Tensor
    given: Tensor
    after: Tensor
    named: Mapping[str, Any]

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
            weight, activate = experts.backend.whole(experts.gate_up(expert), x.dtype), experts.activate
        elif isinstance(experts, SchemeExperts):
            weight, activate = decode(*experts.gate_up(expert), experts.form, x.dtype), experts.activate
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
            rows = x.detach().reshape(-1, x.shape[-1])
            # A tower runs twice over a sample with pictures and videos.
            self.inputs[name] = torch.cat([self.inputs[name], rows]) if name in self.inputs else rows
            if not isinstance(module, nn.Linear | NVFP4Linear | SchemeLinear):
                experts, weights = values[1:3] if len(values) > 2 else (named["top_k_index"], named["top_k_weights"])
                self.routing = Routing(experts, weights)

        return keep
