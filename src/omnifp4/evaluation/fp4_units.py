"""What of a thinker is in FP4, put together as people ask about it: by component and by layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Final

from omnifp4.checkpoint.dialects import CodedLinear, LinearEntries
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.errors import CheckpointError
from omnifp4.formats.scheme import Scheme
from omnifp4.models import layout_for
from omnifp4.runtime.names import OPTIONAL_PARTS
from omnifp4.runtime.placement import EXPERT_NAME, CodedExpertsPlace, CodedPlace, ExpertsPlace, LinearPlace, place
from omnifp4.segments.skeleton import Skeleton

LAYER: Final = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Member:
    """A packed module.

    Attributes:
        name: checkpoint name of the linear, or of the experts of a layer together (``….mlp.experts``).
        path: of the module in the model.
        component: as `plan` names it.
        layer: number from 0; None where there are no layers.
        linears, parameters: that it stands for.
        scheme: of all of them.
    """

    name: str
    path: str
    component: str
    layer: int | None
    linears: int
    parameters: int
    scheme: Scheme = Scheme.NVFP4


@dataclass(frozen=True, slots=True)
class Unit:
    """What is judged together: a component, one layer of it, one expert of that layer, or all (no component).

    Attributes:
        layer: number from 0; None for a whole component.
        members: of it; the experts of the layer where only one of them is meant.
        expert: number from 0; None where all of the members are meant.
    """

    component: str
    layer: int | None
    members: tuple[Member, ...]
    expert: int | None = None


def fp4_members(skeleton: Skeleton, checkpoint: Checkpoint) -> tuple[Member, ...]:
    """Every packed module of an artifact's thinker, in the order of its tensors.

    Args:
        skeleton: of the artifact, with no part loaded yet.
        checkpoint: the artifact.

    Raises:
        CheckpointError: nothing of the thinker is in FP4, or a linear is in no layout of this model.
    """
    placement = place(skeleton.model, checkpoint.tensors, skeleton.renaming, checkpoint.location)
    layout = layout_for(checkpoint.config, checkpoint.tensors).by_name

    def member(name: str, path: str, weights: list[str], parameters: int, scheme: Scheme) -> Member:
        spec = layout.get(f"{weights[0]}.weight")
        if spec is None:
            raise CheckpointError(
                f"{checkpoint.location}: linear {weights[0]!r} is in no layout of a {checkpoint.config.get('model_type')}"
            )
        layer = LAYER.search(name)
        number = int(layer[1]) if layer else None
        return Member(name, path, spec.component.name, number, len(weights), parameters, scheme)

    def count(source: LinearEntries | CodedLinear) -> int:
        return int(source.packed.parameters) * 2 if isinstance(source, LinearEntries) else prod(source.shape)

    linears: list[LinearPlace | CodedPlace] = [*placement.linears, *placement.coded]
    found = [
        member(
            linear.source.module, linear.module, [linear.source.module], count(linear.source), _scheme(linear.source)
        )
        for linear in linears
    ]
    layers: list[ExpertsPlace | CodedExpertsPlace] = [*placement.experts, *placement.coded_experts]
    for experts in layers:
        match = EXPERT_NAME.fullmatch(experts.gate[0].module)
        assert match is not None
        sources: list[LinearEntries | CodedLinear] = [*experts.gate, *experts.up, *experts.down]
        parameters = sum(map(count, sources))
        modules = [source.module for source in sources]
        found.append(member(match["experts"], experts.module, modules, parameters, _scheme(sources[0])))
    if not found:
        raise CheckpointError(
            f"{checkpoint.location}: nothing of its thinker is quantized",
            hint="--component NAME=nvfp4 of quantize puts a component there",
        )
    return tuple(found)


def _scheme(source: LinearEntries | CodedLinear) -> Scheme:
    return source.scheme if isinstance(source, CodedLinear) else Scheme.NVFP4


def outside_thinker(checkpoint: Checkpoint) -> bool:
    """Whether linears of talker or code2wav are quantized too."""
    from omnifp4.checkpoint.artifact import find_coded, find_linears

    names = (*find_linears(checkpoint.tensors), *find_coded(checkpoint.tensors))
    return any(name.startswith(tuple(f"{part}." for part in OPTIONAL_PARTS)) for name in names)


def units(members: tuple[Member, ...]) -> tuple[Unit, ...]:
    """Components first, then the layers of those that have several."""
    components = dict.fromkeys(member.component for member in members)
    found = [Unit(name, None, tuple(m for m in members if m.component == name)) for name in components]
    for whole in list(found):
        layers = sorted({member.layer for member in whole.members if member.layer is not None})
        if len(layers) > 1:
            found += [
                Unit(whole.component, number, tuple(m for m in whole.members if m.layer == number)) for number in layers
            ]
    return tuple(found)
