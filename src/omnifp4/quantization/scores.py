"""What a format costs the model, in nats, where the share of a linear's output that it costs is not enough to tell."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from omnifp4.errors import RecipeError
from omnifp4.formats.scheme import Scheme
from omnifp4.receipt.sensitivity import SENSITIVITY_VERSION, SensitivityReceipt, SensitivityRow

if TYPE_CHECKING:
    from omnifp4.checkpoint.folder import Checkpoint
    from omnifp4.models.source import SourceTensor

LAYER: Final = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")
MAP_HINT: Final = (
    "omnifp4 evaluate OUT --against MODEL --sensitivity --receipt FILE draws one of a plain nvfp4 artifact"
)


@dataclass(frozen=True)
class Group:
    """Linears that get one format: q/k/v, gate/up, all experts of a layer, or one alone.

    Attributes:
        name: for people.
        tensors: their weights.
        share: of tokens that read each of the weights, as the budget counts it.
    """

    name: str
    tensors: tuple[SourceTensor, ...]
    share: float

    @property
    def parameters(self) -> int:
        return sum(tensor.spec.parameters for tensor in self.tensors)


Losses = dict[str, dict[Scheme, float]]
"""By group and scheme."""


def check_map(found: SensitivityReceipt, checkpoint: Checkpoint) -> None:
    """Refuse a map of another model, also of one with the same sizes. Headers alone tell no model from another: then
    `by_divergence` compares sizes, and the weights are looked at when they are here.

    Raises:
        RecipeError: it is of another model or version, or does not tell of which model.
    """
    from omnifp4.calibration.fingerprint import model_fingerprint

    if found.sensitivity_version != SENSITIVITY_VERSION:
        raise RecipeError(
            f"the sensitivity map of {found.model} is of version {found.sensitivity_version}, and this omnifp4 reads "
            f"{SENSITIVITY_VERSION}",
            hint=f"draw it again: {MAP_HINT}",
        )
    if checkpoint.folder is None:
        return
    if not found.against_fingerprint:
        raise RecipeError(
            f"the sensitivity map of {found.model} does not tell which weights it is of: an earlier omnifp4 drew it",
            hint=f"draw it again: {MAP_HINT}",
        )
    if found.against_fingerprint != model_fingerprint(checkpoint):
        raise RecipeError(
            f"the sensitivity map of {found.model} is of another model ({found.against}), not of {checkpoint.location}",
            hint=MAP_HINT,
        )


def by_divergence(
    groups: Sequence[Group], losses: Mapping[str, Mapping[Scheme, float]], found: SensitivityReceipt
) -> Losses:
    """Losses in nats from a sensitivity map: what each layer of each component costs when it alone is in NVFP4.

    A divergence is of second order in the error, so another format costs a layer as much less as its squared error of
    outputs is less; and where one layer of a component has several groups (q/k/v and o), they share its divergence by these
    errors.

    Args:
        groups: that a budget decides.
        losses: squared errors of each group's outputs in each scheme, NVFP4 among them.
        found: a map of an artifact with all of these groups in NVFP4.

    Raises:
        RecipeError: the map is of a model of other sizes, of other components or of another format, was drawn without divergences,
            or shows none above its noise.
    """
    floor = found.noise_floor or 0.0
    result: Losses = {}
    for (component, layer), members in _units(groups, found).items():
        row = next(
            (row for row in found.rows if row.expert is None and (row.component, row.layer) == (component, layer)), None
        )
        place = component if layer is None else f"{component}, layer {layer}"
        if row is None:
            raise RecipeError(f"the sensitivity map of {found.model} has no row of {place}", hint=MAP_HINT)
        _check(row, members, place, found)
        assert row.kl_mean is not None
        cost = max(0.0, row.kl_mean.value - floor)
        whole = sum(losses[group.name][Scheme.NVFP4] for group in members)
        for group in members:
            result[group.name] = {
                scheme: cost * loss / whole if whole else 0.0 for scheme, loss in losses[group.name].items()
            }
    if not any(loss for each in result.values() for loss in each.values()):
        raise RecipeError(
            f"the sensitivity map of {found.model} shows no part that costs more than its noise floor of {floor:.3g}",
            hint="draw it with --dtype float32 and more --samples",
        )
    return result


def _units(groups: Sequence[Group], found: SensitivityReceipt) -> dict[tuple[str, int | None], list[Group]]:
    """Groups by the row of the map that they are part of: a component with a single layer has one row for all of it."""
    layered = {row.component for row in found.rows if row.layer is not None}
    units: dict[tuple[str, int | None], list[Group]] = {}
    for group in groups:
        spec = group.tensors[0].spec
        match = LAYER.search(spec.name)
        layer = int(match[1]) if match and spec.component.name in layered else None
        units.setdefault((spec.component.name, layer), []).append(group)
    return units


def _check(row: SensitivityRow, members: Sequence[Group], place: str, found: SensitivityReceipt) -> None:
    if row.kl_mean is None:
        raise RecipeError(
            f"the sensitivity map of {found.model} tells errors of {place} and no divergence",
            hint="draw it without --segmented, which leaves divergences out",
        )
    if not math.isfinite(row.kl_mean.value - (found.noise_floor or 0.0)):
        raise RecipeError(
            f"the sensitivity map of {found.model} has no finite divergence of {place}",
            hint=f"draw it again: {MAP_HINT}",
        )
    if row.scheme != Scheme.NVFP4.value:
        raise RecipeError(
            f"the sensitivity map of {found.model} has {place} in {row.scheme or 'a scheme that it does not tell'}, not nvfp4",
            hint=MAP_HINT,
        )
    parameters = sum(group.parameters for group in members)
    if row.parameters != parameters:
        raise RecipeError(
            f"the sensitivity map of {found.model} has {row.parameters:,} parameters in {place}, and here are {parameters:,}: "
            "it is of another model, or of other components",
            hint=MAP_HINT,
        )
