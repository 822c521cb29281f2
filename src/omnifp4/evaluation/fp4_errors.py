"""Errors of FP4 weights and of what they make of real activations, layer by layer from disk.

The wide model runs; beside each of its layers the same layer of the artifact is read, and every linear of it is given
the inputs that the wide one had. So an error is that of one linear, or of one expert, and not of those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.errors import OmniFP4Error
from omnifp4.evaluation.encoding import EncodedSample
from omnifp4.evaluation.fp4_units import Member
from omnifp4.evaluation.sides import ATTENTION
from omnifp4.evaluation.store import Store
from omnifp4.runtime.coded import SchemeExperts, SchemeLinear, decode
from omnifp4.runtime.packed import NVFP4Linear, PackedExperts
from omnifp4.segments import LayerVisit, run_segments
from omnifp4.segments.loading import PartLoader
from omnifp4.segments.skeleton import AUDIO, HEAD, VISION, Skeleton, layer_part

Tell = Callable[[int, int, str], None]
Place = tuple[str, int]
"""A member's name and the number of an expert; -1 for a linear."""

NO_EXPERT: Final = -1


@dataclass(slots=True)
class ErrorSums:
    """Of one linear or one expert; sums over all its weights, and over all outputs of all samples.

    Attributes:
        linears, parameters: that it stands for.
        weight_error, weight_power: ``sum((w - w')**2)`` and ``sum(w**2)``.
        output_error, output_power: the same of outputs.
        tokens: whose outputs these are.
    """

    linears: int = 0
    parameters: int = 0
    weight_error: float = 0.0
    weight_power: float = 0.0
    output_error: float = 0.0
    output_power: float = 0.0
    tokens: int = 0

    def weigh(self, wide: Tensor, made: Tensor) -> None:
        """One more matrix."""
        wide, made = wide.float(), made.float()
        self.linears += 1
        self.parameters += wide.numel()
        self.weight_error += float((made - wide).square().sum(dtype=torch.float64))
        self.weight_power += float(wide.square().sum(dtype=torch.float64))

    def judge(self, wide: Tensor, made: Tensor) -> None:
        """Outputs ``[tokens, out]`` of one sample."""
        self.output_error += float((made - wide).square().sum(dtype=torch.float64))
        self.output_power += float(wide.square().sum(dtype=torch.float64))
        self.tokens += len(wide)


class LayerErrors:
    """Compares the artifact's layer with the one that runs."""

    def __init__(
        self, skeleton: Skeleton, loader: PartLoader, members: Sequence[Member], samples: int, store: Store
    ) -> None:
        """`skeleton` and `loader` are of the artifact; `store` keeps whole layers, for a run that is killed."""
        self._skeleton, self._loader, self._samples, self._store = skeleton, loader, samples, store
        paths = {id(module): path for path, module in skeleton.model.named_modules()}
        self._roots = {name: paths[id(part.module)] for name, part in skeleton.parts.items()}
        self._members = [member for member in members if _part_of(skeleton, member) is None]
        self._weights: dict[str, Any] = {}
        self.found: dict[Place, ErrorSums] = {}

    @property
    def names(self) -> list[str]:
        """Of all members in the decoder's layers."""
        return [member.name for member in self._members]

    def recall(self, layers: int) -> None:
        """Take the first layers from the store."""
        for number in range(layers):
            arrays = self._store.read(f"layer-{number}")
            if arrays is not None:
                self.found |= _read(arrays)

    def visit(self, visit: LayerVisit) -> None:
        """One sample in one layer of the wide model."""
        part = self._skeleton.parts[layer_part(visit.layer)]
        here = [member for member in self._members if member.name.startswith(f"{visit.name}.")]
        if not here:
            return
        if visit.sample == 0:
            self._loader.take(part)
        root = self._roots[part.name]
        for member in here:
            relative = member.path.removeprefix(f"{root}.")
            packed, wide = part.module.get_submodule(relative), visit.module.get_submodule(relative)
            if isinstance(packed, PackedExperts | SchemeExperts):
                self._experts(visit, member, packed, wide)
            else:
                self._linear(visit, member, packed, wide)
        if visit.sample == self._samples - 1:
            self._loader.free(part)
            self._weights.clear()
            names = {member.name for member in here}
            self._store.write(f"layer-{visit.layer}", _arrays({k: v for k, v in self.found.items() if k[0] in names}))

    def _linear(self, visit: LayerVisit, member: Member, packed: nn.Module, wide: nn.Module) -> None:
        place = (member.name, NO_EXPERT)
        if visit.sample == 0:
            self._weights[member.name] = dequantized(packed)
            self.found[place] = ErrorSums()
            self.found[place].weigh(_weight(wide), self._weights[member.name])
        x = visit.inputs[member.name].float()
        self.found[place].judge(x @ _weight(wide).float().T, x @ self._weights[member.name].float().T)

    def _experts(self, visit: LayerVisit, member: Member, packed: PackedExperts | SchemeExperts, wide: Any) -> None:
        if visit.sample == 0:
            for expert in range(packed.num_experts):
                weights = dequantized_expert(packed, expert)
                self._weights[f"{member.name}.{expert}"] = weights
                sums = self.found[member.name, expert] = ErrorSums()
                for mine, made in zip(expert_matrices(wide, expert), weights, strict=True):
                    sums.weigh(mine, made)
                # Gate and up are one matrix in memory and two linears in a checkpoint.
                sums.linears += 1
        assert visit.routing is not None
        for expert in sorted(set(visit.routing.experts.flatten().tolist())):
            x = visit.expert_inputs(expert).float()
            outputs = [
                _expert(x, [matrix.float() for matrix in matrices], packed.activate)
                for matrices in (expert_matrices(wide, expert), self._weights[f"{member.name}.{expert}"])
            ]
            self.found[member.name, expert].judge(*outputs)


def fp4_errors(
    model: Checkpoint,
    reference: Checkpoint,
    members: tuple[Member, ...],
    samples: Sequence[EncodedSample],
    *,
    device: torch.device,
    dtype: torch.dtype,
    store: Store,
    work: Any,
    tell: Tell,
) -> dict[Place, ErrorSums]:
    """Errors of every FP4 linear and expert of the thinker; outside the decoder's layers those of weights alone.

    Memory: two decoder layers wide, one packed, and the hidden states of all samples.

    Args:
        model: the artifact.
        reference: what it was made from.
        members: of the artifact.
        samples: whose activations are taken.
        device, dtype: of the run of the wide model.
        store: for layers that are done.
        work: folder in which a killed run goes on; None for none. Needs a `store` that keeps.
        tell: called with bytes of weights used, bytes in all, and the part.
    """
    skeleton = Skeleton(model, dtype=dtype, device=device)
    with torch.no_grad(), PartLoader(skeleton, model, device=device, backend="auto") as loader:
        errors = LayerErrors(skeleton, loader, members, len(samples), store)
        run = run_segments(
            reference, samples, device=device, dtype=dtype, attention=ATTENTION, on_layer=errors.visit, work=work,
            progress=tell,
        )  # fmt: skip
        errors.recall(run.resumed_after)
        found = errors.found
        if any(name not in {known for known, _ in found} for name in errors.names):
            raise OmniFP4Error(f"{work}: holds states of layers whose errors are lost", hint="remove it and run again")
        found |= _outside_layers(skeleton, loader, reference, members)
    # In one order, so that sums of a run that was interrupted come out alike to the last bit.
    return dict(sorted(found.items()))


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a packed linear, BF16 ``[out, in]``."""
    assert isinstance(module, NVFP4Linear | SchemeLinear)
    return module.weight


def dequantized_expert(experts: PackedExperts | SchemeExperts, expert: int) -> tuple[Tensor, Tensor]:
    """Gate over up ``[2 I, H]`` and down ``[H, I]`` of one packed expert, BF16."""
    if isinstance(experts, SchemeExperts):
        form = experts.form
        return (
            decode(*experts.gate_up(expert), form, torch.bfloat16), decode(*experts.down(expert), form, torch.bfloat16)
        )  # fmt: skip
    unpack = experts.backend.whole
    return unpack(experts.gate_up(expert), torch.bfloat16), unpack(experts.down(expert), torch.bfloat16)


def expert_matrices(experts: Any, expert: int) -> tuple[Tensor, Tensor]:
    """The same of wide experts."""
    return experts.gate_up_proj[expert], experts.down_proj[expert]


def _expert(x: Tensor, matrices: Sequence[Tensor], activate: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = (x @ matrices[0].T).chunk(2, dim=-1)
    return (activate(gate) * up) @ matrices[1].T


def _outside_layers(
    skeleton: Skeleton, loader: PartLoader, reference: Checkpoint, members: Sequence[Member]
) -> dict[Place, ErrorSums]:
    """Weight errors of towers and head, whose inputs no layer shows."""
    found: dict[Place, ErrorSums] = {}
    outside = [(member, name) for member in members if (name := _part_of(skeleton, member)) is not None]
    if not outside:
        return found
    wide = Skeleton(reference, dtype=skeleton.dtype, device=torch.device("cpu"))
    with PartLoader(wide, reference, device=torch.device("cpu"), backend="auto") as wide_loader:
        for name in dict.fromkeys(name for _, name in outside):
            loader.take(skeleton.parts[name])
            wide_loader.take(wide.parts[name])
            for member, part in outside:
                if part == name:
                    sums = found[member.name, NO_EXPERT] = ErrorSums()
                    made = dequantized(skeleton.model.get_submodule(member.path)).cpu()
                    sums.weigh(_weight(wide.model.get_submodule(member.path)), made)
            loader.free(skeleton.parts[name])
            wide_loader.free(wide.parts[name])
    return found


def _part_of(skeleton: Skeleton, member: Member) -> str | None:
    """The part outside the decoder's layers that a member lies in; None if it lies in a layer."""
    module = skeleton.model.get_submodule(member.path)
    for name in (AUDIO, VISION, HEAD):
        if any(module is inner for inner in skeleton.parts[name].module.modules()):
            return name
    return None


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _arrays(found: dict[Place, ErrorSums]) -> dict[str, Any]:
    values = [[getattr(sums, item.name) for item in fields(ErrorSums)] for sums in found.values()]
    return {
        "names": np.array([name for name, _ in found]),
        "experts": np.array([expert for _, expert in found], dtype=np.int64),
        "values": np.array(values, dtype=np.float64),
    }


def _read(arrays: dict[str, Any]) -> dict[Place, ErrorSums]:
    found = {}
    for name, expert, row in zip(arrays["names"], arrays["experts"], arrays["values"], strict=True):
        linears, parameters, weight_error, weight_power, output_error, output_power, tokens = map(float, row)
        found[str(name), int(expert)] = ErrorSums(
            int(linears), int(parameters), weight_error, weight_power, output_error, output_power, int(tokens)
        )
    return found
