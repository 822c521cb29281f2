"""Running sums of inputs: what a statistics file is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from omnifp4.calibration.statistics import ALL_EXPERT, BLOCK, ROUTED, Source, expert_bank

CHUNK_TOKENS: Final = 8192
"""Inputs that are waited for before they are summed: one large product is faster than many small ones."""


class Sums:
    """Of the inputs of some weights of one width, such as one projection of all experts of a layer."""

    def __init__(self, rows: int, width: int, device: torch.device, *, blocks: bool) -> None:
        """`rows` weights with inputs of `width`; `blocks`: products within blocks of 16 too, where they divide it."""
        self.tokens = torch.zeros(rows, dtype=torch.int64)
        self.amax = torch.zeros(rows, dtype=torch.float32, device=device)
        self.magnitude = torch.zeros(rows, width, dtype=torch.float64, device=device)
        self.square = torch.zeros_like(self.magnitude)
        shape = (rows, width // BLOCK, BLOCK, BLOCK)
        self.blocks = None if width % BLOCK or not blocks else self.magnitude.new_zeros(shape)

    def add(self, row: int, inputs: Tensor) -> None:
        """Add ``[tokens, width]`` to one weight's sums."""
        if not len(inputs):
            return
        x = inputs.float()
        magnitude = x.abs()
        self.tokens[row] += len(x)
        self.amax[row] = torch.maximum(self.amax[row], magnitude.max())
        self.magnitude[row] += magnitude.sum(0, dtype=torch.float64)
        if self.blocks is None:
            self.square[row] += x.square().sum(0, dtype=torch.float64)
            return
        blocks = x.view(len(x), -1, BLOCK).transpose(0, 1)
        products = torch.bmm(blocks.transpose(1, 2), blocks)
        self.blocks[row] += products
        self.square[row] += products.diagonal(dim1=1, dim2=2).reshape(-1)

    def means(self, bank: str, source: Source) -> dict[str, Tensor]:
        """Tensors of a statistics file, on the host; a weight that saw nothing has zeros."""
        counts = self.tokens.clamp(min=1).to(self.magnitude.device)
        found = {
            "tokens": self.tokens,
            "amax": self.amax,
            "abs_mean": (self.magnitude / counts[:, None]).float(),
            "square_mean": (self.square / counts[:, None]).float(),
        }
        if self.blocks is not None:
            found["block_hessian"] = (self.blocks / counts[:, None, None, None]).float()
        return {f"{bank}.{source}.{field}": value.cpu() for field, value in found.items()}


def expert_inner(experts: Any, number: int, inputs: Tensor) -> Tensor:
    """Input of one wide expert's down projection, ``[tokens, inner]``, from the layer's inputs ``[tokens, hidden]``."""
    gate, up = torch.nn.functional.linear(inputs, experts.gate_up_proj[number]).chunk(2, dim=-1)
    inner: Tensor = experts.act_fn(gate) * up
    return inner


def sent_to(chosen: Tensor, expert: int) -> Tensor:
    """Numbers of the tokens that the router sent to an expert; `chosen` is ``[tokens, k]``."""
    return (chosen == expert).any(dim=-1).nonzero()[:, 0]


@dataclass(slots=True)
class _Waiting:
    """Inputs that are not summed yet."""

    inputs: list[Tensor]
    chosen: list[Tensor]
    tokens: int = 0


class Collector:
    """Sums over the linears and experts of some layers. What is added must be finite.

    Attributes:
        tensors, weights, experts: after `finish`: of a statistics file.
    """

    def __init__(self, *, blocks: bool, all_expert_tokens: int, stride: int = 1) -> None:
        """Args:
        blocks: collect block Hessians.
        all_expert_tokens: tokens that each layer's experts all get, beside those that are routed to them.
        stride: of the tokens, every so-manieth is among these.
        """
        self._blocks, self._most, self._stride = blocks, all_expert_tokens, stride
        self._linears: dict[str, Sums] = {}
        self._routed: dict[str, tuple[Sums, Sums]] = {}
        self._modules: dict[str, Any] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._seen: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, str] = {}
        self.experts: dict[str, int] = {}

    def add_linear(self, bank: str, weights: tuple[str, ...], inputs: Tensor) -> None:
        """Inputs ``[tokens, in]`` that some linears share."""
        self.weights |= dict.fromkeys(weights, bank)
        waiting = self._waiting.setdefault(bank, _Waiting([], []))
        waiting.inputs.append(inputs)
        waiting.tokens += len(inputs)
        if waiting.tokens >= CHUNK_TOKENS:
            self._sum_linear(bank)

    def add_experts(self, name: str, module: Any, inputs: Tensor, chosen: Tensor) -> None:
        """Inputs ``[tokens, hidden]`` of a layer's experts, and the experts that were chosen, ``[tokens, k]``."""
        self._modules[name] = module
        self.experts[name] = int(module.down_proj.shape[0])
        waiting = self._waiting.setdefault(name, _Waiting([], []))
        waiting.inputs.append(inputs)
        waiting.chosen.append(chosen)
        waiting.tokens += len(inputs)
        self._keep(name, inputs)
        if waiting.tokens >= CHUNK_TOKENS:
            self._sum_experts(name)

    def _keep(self, name: str, inputs: Tensor) -> None:
        seen = self._seen.get(name, 0)
        kept = inputs[-seen % self._stride :: self._stride]
        self._seen[name] = seen + len(inputs)
        held = self._kept.setdefault(name, [])
        room = self._most - sum(map(len, held))
        if room > 0 and len(kept):
            held.append(kept[:room].clone())

    def _sum_linear(self, bank: str) -> None:
        waiting = self._waiting.pop(bank)
        inputs = torch.cat(waiting.inputs)
        if bank not in self._linears:
            self._linears[bank] = Sums(1, inputs.shape[1], inputs.device, blocks=self._blocks)
        self._linears[bank].add(0, inputs)

    def _sum_experts(self, name: str) -> None:
        waiting, module = self._waiting.pop(name), self._modules[name]
        inputs, chosen = torch.cat(waiting.inputs), torch.cat(waiting.chosen)
        if name not in self._routed:
            self._routed[name] = self._expert_sums(name, inputs, self.experts[name])
        first, second = self._routed[name]
        for number in range(self.experts[name]):
            routed = inputs[sent_to(chosen, number)]
            first.add(number, routed)
            second.add(number, expert_inner(module, number, routed))

    def _expert_sums(self, name: str, inputs: Tensor, first_rows: int) -> tuple[Sums, Sums]:
        width, inner, device = inputs.shape[1], int(self._modules[name].down_proj.shape[2]), inputs.device
        return (
            Sums(first_rows, width, device, blocks=self._blocks),
            Sums(self.experts[name], inner, device, blocks=self._blocks),
        )

    def finish(self) -> None:
        """Sum what waits, and give all experts the tokens that were kept for them."""
        for name in list(self._waiting):
            self._sum_experts(name) if name in self._modules else self._sum_linear(name)
        for bank, sums in self._linears.items():
            self.tensors |= sums.means(bank, ROUTED)
        for name, (first, second) in self._routed.items():
            self._finish_experts(name, ROUTED, first, second)
            if held := self._kept.pop(name, None):
                inputs = torch.cat(held)
                first, second = self._expert_sums(name, inputs, 1)
                first.add(0, inputs)
                for number in range(self.experts[name]):
                    inner = expert_inner(self._modules[name], number, inputs)
                    # An expert may overflow on tokens that the router would never send to it.
                    second.add(number, inner[inner.isfinite().all(dim=-1)])
                self._finish_experts(name, ALL_EXPERT, first, second)
        self._linears, self._routed = {}, {}

    def _finish_experts(self, name: str, source: Source, first: Sums, second: Sums) -> None:
        self.tensors |= first.means(expert_bank(name, "gate_proj"), source)
        self.tensors |= second.means(expert_bank(name, "down_proj"), source)


def routed_tokens(tensors: Mapping[str, Tensor], experts: str) -> tuple[int, ...]:
    """How many tokens each expert of a group was sent."""
    return tuple(tensors[f"{expert_bank(experts, 'gate_proj')}.{ROUTED}.tokens"].tolist())
