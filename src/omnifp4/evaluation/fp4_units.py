"""What of a thinker is in FP4, put together as people ask about it: by component and by layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.errors import CheckpointError
from omnifp4.models import layout_for
from omnifp4.runtime.names import OPTIONAL_PARTS
from omnifp4.runtime.placement import EXPERT_NAME, place
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
    """

    name: str
    path: str
    component: str
    layer: int | None
    linears: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Members that are judged together: a component, one layer of it (`layer` is its number), or all (no component)."""

    component: str
    layer: int | None
    members: tuple[Member, ...]


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

    def member(name: str, path: str, weights: list[str], parameters: int) -> Member:
        spec = layout.get(f"{weights[0]}.weight")
        if spec is None:
            raise CheckpointError(
                f"{checkpoint.location}: linear {weights[0]!r} is in no layout of a {checkpoint.config.get('model_type')}"
            )
        layer = LAYER.search(name)
        return Member(name, path, spec.component.name, int(layer[1]) if layer else None, len(weights), parameters)

    def count(source: Any) -> int:
        return int(source.packed.parameters) * 2

    found = [
        member(place.source.module, place.module, [place.source.module], count(place.source))
        for place in placement.linears
    ]
    for experts in placement.experts:
        match = EXPERT_NAME.fullmatch(experts.gate[0].module)
        assert match is not None
        sources = [*experts.gate, *experts.up, *experts.down]
        parameters = sum(map(count, sources))
        found.append(member(match["experts"], experts.module, [source.module for source in sources], parameters))
    if not found:
        raise CheckpointError(
            f"{checkpoint.location}: nothing of its thinker is in FP4",
            hint="--component NAME=nvfp4 of quantize puts a component there",
        )
    return tuple(found)


def outside_thinker(checkpoint: Checkpoint) -> bool:
    """Whether linears of talker or code2wav are in FP4 too."""
    from omnifp4.checkpoint.artifact import find_linears

    return any(
        name.startswith(tuple(f"{part}." for part in OPTIONAL_PARTS)) for name in find_linears(checkpoint.tensors)
    )


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
