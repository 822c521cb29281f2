"""Layer by layer: full Hessians and inputs of every linear and expert, for what is too large to be kept in a file.

At full size the Hessians of one layer's experts take 2.4 GB, those of the model 115 GB. So a layer is visited while it and
its inputs are in memory, and what the visitor makes of it is all that stays.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from omnifp4.calibration.preparation import Preparation, Progress, layer_count, prepare
from omnifp4.calibration.record import NOT_VISITED, calibration_receipt, components, expert_tokens
from omnifp4.calibration.running import run_layers
from omnifp4.calibration.statistics import ALL_EXPERT, EXPERT_WEIGHT, FIELDS, NONE, ROUTED, InputStatistics, Source
from omnifp4.calibration.sums import CHUNK_TOKENS, Sums, expert_inner, sent_to
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.calibration import CalibrationReceipt, ExpertTokens

ALL_EXPERT_TOKENS: Final = 2048
"""Inputs of an expert that saw too few of its own."""


class LayerInputs(ABC):
    """One decoder layer with all that was seen of it. Holds only until the visitor returns.

    Attributes:
        layer: its number, from 0.
        layers: how many there are.
        name: checkpoint name, such as ``thinker.model.layers.3``.
        names: checkpoint names of all its linears' and experts' weights.
        device: where weights, Hessians and samples are.
        module: the layer itself.
        runs: every sample through it; empty unless `visit_layers` was asked for them.
    """

    layer: int
    layers: int
    name: str
    names: tuple[str, ...]
    device: torch.device
    module: nn.Module
    runs: tuple[LayerRun, ...]

    @abstractmethod
    def weight(self, weight_name: str) -> Tensor:
        """The wide weight ``[out, in]`` as the layer runs with it, a view: who writes to it puts it back."""

    @abstractmethod
    def gradient(self, weight_name: str) -> Tensor | None:
        """That of the weight, a view too; None where there is none."""

    @abstractmethod
    def source(self, weight_name: str) -> Source:
        """What `hessian`, `samples` and `statistics` are of: as in a statistics file."""

    @abstractmethod
    def tokens(self, weight_name: str) -> int:
        """How many inputs `hessian` is the mean of; 0 if there are none."""

    @abstractmethod
    def bank(self, weight_name: str) -> str:
        """The same for weights that read the same inputs: q, k and v; gate and up of an expert."""

    @abstractmethod
    def hessian(self, weight_name: str) -> Tensor:
        """E[x x'], float32 ``[in, in]``, symmetric, not damped; made when it is asked for.

        Weights of one bank share it: asking for them one after the other costs one.

        Raises:
            OmniFP4Error: `source` is ``none``.
        """

    @abstractmethod
    def samples(self, weight_name: str) -> Tensor:
        """Some of the inputs, spread evenly, ``[n, in]`` in the dtype of the run; n is at most `sample_inputs`.

        Raises:
            OmniFP4Error: `source` is ``none``.
        """

    @abstractmethod
    def statistics(self, weight_name: str) -> InputStatistics:
        """The same as a statistics file holds.

        Raises:
            OmniFP4Error: `source` is ``none``.
        """


Visitor = Callable[[str, LayerInputs], Mapping[str, Tensor] | None]
"""Takes a layer's name and its inputs. May return weights by checkpoint name, ``[out, in]``, that take the place of the
layer's: in sequential mode the layers behind see what these make of the samples."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of what is kept of a layer; see `visit_layers`."""

    sample_inputs: int
    least_tokens: int
    most_tokens: int
    runs: bool = False


@dataclass(frozen=True, slots=True)
class LayerRun:
    """One sample through the layer: what it reads and what it gives, ``(1, tokens, hidden)``, and its other arguments."""

    before: Tensor
    given: Tensor
    named: Mapping[str, Any]


def visit_layers(
    model: str | Path,
    data: str | Path,
    visitor: Visitor,
    *,
    device: str = "auto",
    dtype: str = "bfloat16",
    sequential: bool = False,
    sample_inputs: int = 512,
    least_tokens: int = 64,
    most_tokens: int = 131_072,
    max_failed: float = 0.05,
    samples: int | None = None,
    seed: int = 0,
    runs: bool = False,
    progress: Progress | None = None,
) -> CalibrationReceipt:
    """Run a calibration set through a model, and show each decoder layer with its inputs.

    Args:
        model: folder of a wide checkpoint: a Qwen3-Omni (its thinker is run), Qwen3-MoE, Qwen3 or Llama.
        data: what ``omnifp4 dataset`` made, a JSONL file, or ``bundled``.
        visitor: called once a layer, in order.
        device: ``auto``, ``cpu``, ``cuda`` …
        dtype: of the arithmetic, ``bfloat16`` or ``float32``.
        sequential: weights that the visitor returns take part in the run: the samples pass the layer again with them.
        sample_inputs: rows that `LayerInputs.samples` gives at most.
        least_tokens: an expert with fewer routed tokens takes inputs of all tokens instead.
        most_tokens: of the set that Hessians are made of, spread evenly; they stay in memory for one layer.
        max_failed: share of samples that may fail.
        samples, seed: how many conversations of the set, and the seed of their choice; None takes all, and 60 of the bundled.
        runs: keep what the layer reads and gives for every sample: twice the hidden states of the set.
        progress: called with bytes of weights used, bytes in all, and what is being done.

    Raises:
        OmniFP4Error: model or data are not right.
        CalibrationFailed: too many samples failed.
    """
    for name, value in (("sample_inputs", sample_inputs), ("least_tokens", least_tokens), ("most_tokens", most_tokens)):
        if value < 1:
            raise OmniFP4Error(f"{name} is {value}", hint="1 or more")
    tell = progress or (lambda *_: None)
    prepared = prepare(
        model, data, samples=samples, seed=seed, device=device, dtype=dtype, max_failed=max_failed,
        progress=lambda done, total, item: tell(done, total, f"reading {item}"),
    )  # fmt: skip
    limits = Limits(sample_inputs, least_tokens, most_tokens, runs)
    return visit_prepared(prepared, visitor, limits, sequential=sequential, progress=tell)


def visit_prepared(
    prepared: Preparation, visitor: Visitor, limits: Limits, *, sequential: bool, progress: Progress
) -> CalibrationReceipt:
    """As `visit_layers`, of a model and sequences that are prepared already."""
    begin = time.monotonic()
    visits = _Visits(prepared, visitor, limits, sequential)
    run_layers(prepared, on_layer=visits.visit, on_layer_done=visits.layer_done, work=None, progress=progress)
    captured, missing = components(prepared, visits.weights, visits.experts, silent=NOT_VISITED, otherwise=NOT_VISITED)
    return calibration_receipt(
        prepared, least_tokens=limits.least_tokens, experts=tuple(visits.experts.values()), captured=captured, missing=missing,
        block_hessians=False, tensors={}, resumed=0, begin=begin,
    )  # fmt: skip


@dataclass(slots=True)
class _Group:
    """Inputs of one layer's experts; `counts` are the tokens that were routed to each."""

    module: Any
    inputs: Tensor
    chosen: Tensor
    counts: tuple[int, ...]


class _Kept(LayerInputs):
    """What the samples left of one layer."""

    def __init__(self, visit: Any, layers: int, limits: Limits) -> None:
        self.layer, self.layers, self.name = visit.layer, layers, visit.name
        self.device, self.module = visit.before.device, visit.module
        self.runs = ()
        self._runs: list[LayerRun] = []
        self._limits = limits
        self._modules: Mapping[str, Any] = visit.modules
        self._banks: dict[str, str] = {}
        self._parts: dict[str, list[Tensor]] = {}
        self._chosen: dict[str, list[Tensor]] = {}
        self._whole: dict[str, Tensor] = {}
        self._groups: dict[str, _Group] = {}
        self._last: tuple[str, Tensor] | None = None
        self._hessian: tuple[str, Tensor] | None = None

    def add(self, visit: Any, prepared: Preparation, rows: slice) -> None:
        """Keep some of one sample's inputs."""
        kept: set[str] = set()
        if self._limits.runs:
            self._runs.append(LayerRun(visit.before.clone(), visit.given.clone(), visit.named))
        for name, inputs in visit.inputs.items():
            if name.endswith(".experts"):
                self._chosen.setdefault(name, []).append(visit.routing.experts[rows].clone())
                bank = name
            elif f"{name}.weight" in prepared.linears:
                bank = prepared.bank(f"{name}.weight")
                self._banks[f"{name}.weight"] = bank
            else:
                continue
            if bank not in kept:
                kept.add(bank)
                self._parts.setdefault(bank, []).append(inputs[rows].clone())

    def close(self) -> None:
        """All samples have passed."""
        self.runs = tuple(self._runs)
        self._whole = {bank: torch.cat(self._parts.pop(bank)) for bank in list(self._parts)}
        for name, chosen in self._chosen.items():
            module, sent = self._modules[name], torch.cat(chosen)
            counts = torch.bincount(sent.flatten(), minlength=int(module.down_proj.shape[0]))
            self._groups[name] = _Group(module, self._whole.pop(name), sent, tuple(counts.tolist()))
        of_experts = [
            f"{name}.{number}.{part}.weight"
            for name, group in self._groups.items()
            for number in range(len(group.counts))
            for part in ("gate_proj", "up_proj", "down_proj")
        ]
        self.names = (*self._banks, *of_experts)

    def weight(self, weight_name: str) -> Tensor:
        """See `LayerInputs.weight`."""
        parameter, part = self._parameter(weight_name)
        return part(parameter.data)

    def gradient(self, weight_name: str) -> Tensor | None:
        """See `LayerInputs.gradient`."""
        parameter, part = self._parameter(weight_name)
        return None if parameter.grad is None else part(parameter.grad)

    def _parameter(self, weight_name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The parameter that holds a weight, and what takes the weight out of it or out of what is shaped alike."""
        match = EXPERT_WEIGHT.fullmatch(weight_name)
        if match is None or match["experts"] not in self._groups:
            return cast(Tensor, self._modules[weight_name.removesuffix(".weight")].weight), lambda whole: whole
        module, number = self._groups[match["experts"]].module, int(match["number"])
        if match["part"] == "down_proj":
            return module.down_proj, lambda whole: whole[number]
        half = 0 if match["part"] == "gate_proj" else 1
        return module.gate_up_proj, lambda whole: whole[number].chunk(2)[half]

    def source(self, weight_name: str) -> Source:
        """See `LayerInputs.source`."""
        if weight_name in self._banks:
            return ROUTED
        found = self._expert(weight_name)
        if found is None:
            return NONE
        group, number, _ = found
        if group.counts[number] >= self._limits.least_tokens:
            return ROUTED
        return ALL_EXPERT if len(group.inputs) >= self._limits.least_tokens else NONE

    def tokens(self, weight_name: str) -> int:
        """See `LayerInputs.tokens`."""
        return 0 if self.source(weight_name) == NONE else len(self._inputs(weight_name))

    def hessian(self, weight_name: str) -> Tensor:
        """See `LayerInputs.hessian`."""
        inputs, key = self._inputs(weight_name), self.bank(weight_name)
        if self._hessian is None or self._hessian[0] != key:
            self._hessian = None
            found = torch.zeros(inputs.shape[1], inputs.shape[1], device=inputs.device)
            for chunk in torch.split(inputs, CHUNK_TOKENS):
                x = chunk.float()
                found.addmm_(x.T, x)
            # Products on a GPU need not be symmetric to the last bit.
            self._hessian = key, (found + found.T).div_(2 * len(inputs))
        return self._hessian[1].clone()

    def samples(self, weight_name: str) -> Tensor:
        """See `LayerInputs.samples`."""
        inputs = self._inputs(weight_name)
        step = -(-len(inputs) // self._limits.sample_inputs)
        return inputs[::step]

    def statistics(self, weight_name: str) -> InputStatistics:
        """See `LayerInputs.statistics`."""
        source, inputs = self.source(weight_name), self._inputs(weight_name)
        sums = Sums(1, inputs.shape[1], inputs.device, blocks=True)
        for chunk in torch.split(inputs, CHUNK_TOKENS):
            sums.add(0, chunk)
        means = sums.means("", source)
        found = {field: means[f".{source}.{field}"][0] for field in FIELDS[1:] if f".{source}.{field}" in means}
        return InputStatistics(
            len(inputs), found["amax"], found["abs_mean"], found["square_mean"], found.get("block_hessian"), source
        )

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights in the place of the layer's."""
        for name, value in weights.items():
            if name not in self.names:
                raise OmniFP4Error(f"the visitor gave weight {name!r}, which is not of {self.name}")
            into = self.weight(name)
            if value.shape != into.shape:
                raise OmniFP4Error(f"the visitor gave {name!r} as {list(value.shape)}; it is {list(into.shape)}")
            into.copy_(value)

    def tokens_of_experts(self) -> dict[str, ExpertTokens]:
        """How each group's experts were reached."""
        found = {}
        for name, group in self._groups.items():
            shared = [min(len(group.inputs), ALL_EXPERT_TOKENS)] * len(group.counts)
            found[name] = expert_tokens(name, group.counts, shared, self._limits.least_tokens)
        return found

    def plain(self) -> tuple[str, ...]:
        """Weights of plain linears."""
        return tuple(self._banks)

    def _expert(self, weight_name: str) -> tuple[_Group, int, str] | None:
        match = EXPERT_WEIGHT.fullmatch(weight_name)
        group = self._groups.get(match["experts"]) if match else None
        if match is None or group is None or int(match["number"]) >= len(group.counts):
            return None
        return group, int(match["number"]), match["part"]

    def bank(self, weight_name: str) -> str:
        """See `LayerInputs.bank`."""
        return self._banks.get(weight_name) or weight_name.replace(".up_proj.", ".gate_proj.")

    def _inputs(self, weight_name: str) -> Tensor:
        """Of one weight ``[tokens, in]``; the last is kept, since gate and up, and the questions of one weight, share it."""
        source, found = self.source(weight_name), self._expert(weight_name)
        if source == NONE:
            raise OmniFP4Error(f"layer {self.layer} has no inputs of {weight_name!r}")
        if found is None:
            return self._whole[self._banks[weight_name]]
        group, number, part = found
        key = self.bank(weight_name)
        if self._last is None or self._last[0] != key:
            inputs = group.inputs
            if source == ROUTED:
                inputs = inputs[sent_to(group.chosen, number)]
            elif len(inputs) > ALL_EXPERT_TOKENS:
                inputs = inputs[:: -(-len(inputs) // ALL_EXPERT_TOKENS)]
            if part == "down_proj":
                inner = expert_inner(group.module, number, inputs)
                inputs = inner if source == ROUTED else inner[inner.isfinite().all(dim=-1)]
            self._last = key, inputs
        return self._last[1]


class _Visits:
    """Collects one layer after the other, and shows each to the visitor."""

    def __init__(self, prepared: Preparation, visitor: Visitor, limits: Limits, sequential: bool) -> None:
        self._prepared, self._visitor, self._limits, self._sequential = prepared, visitor, limits, sequential
        tokens = [int(one.tensors["input_ids"].shape[1]) for one in prepared.sequences]
        self._stride = -(-sum(tokens) // limits.most_tokens)
        self._begins = [sum(tokens[:number]) for number in range(len(tokens))]
        self._layers = layer_count(prepared.checkpoint)
        self._kept: _Kept | None = None
        self.weights: set[str] = set()
        self.experts: dict[str, ExpertTokens] = {}

    def visit(self, visit: Any) -> None:
        """One sample in one layer."""
        if self._kept is None:
            self._kept = _Kept(visit, self._layers, self._limits)
        self._kept.add(visit, self._prepared, slice(-self._begins[visit.sample] % self._stride, None, self._stride))

    def layer_done(self, layer: int) -> bool:
        """All samples have passed; True if they are to pass again."""
        kept, self._kept = self._kept, None
        assert kept is not None
        kept.close()
        self.weights.update(kept.plain())
        self.experts |= kept.tokens_of_experts()
        changed = self._visitor(kept.name, kept)
        if not changed or not self._sequential:
            return False
        kept.replace(changed)
        return True
