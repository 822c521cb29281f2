"""A format for each layer, under a budget of bits: what every choice costs and how much it hurts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from omnifp4.checkpoint.dtypes import byte_count
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import RecipeError
from omnifp4.formats import coded
from omnifp4.formats.nvfp4 import EXPECTED_RELATIVE_ERROR, Float32Array, ScaleRule
from omnifp4.formats.scheme import Scheme
from omnifp4.formats.widening import widen
from omnifp4.models.base import Component, Kind, Part
from omnifp4.models.source import Source, SourceTensor
from omnifp4.quantization.decisions import OutputFormat, stored_tensors
from omnifp4.quantization.method import Auto, Counted, Score
from omnifp4.quantization.recipe import Recipe, choose_schemes
from omnifp4.quantization.scores import MAP_HINT, Group, by_divergence, check_map

if TYPE_CHECKING:
    from omnifp4.calibration.statistics import Statistics
    from omnifp4.receipt.sensitivity import SensitivityReceipt

Progress = Callable[[int, int, str], None]

DEFAULT_EXPERTS_PER_TOKEN: Final = 8
"""Of every config class with experts that is known here, where the config does not say it."""


def assign(
    source: Source,
    recipe: Recipe,
    overrides: Mapping[str, Scheme],
    output_format: OutputFormat,
    statistics: Statistics | None,
    *,
    sensitivity: SensitivityReceipt | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, Scheme]:
    """The scheme of every weight that a budget decides, by name; empty for a recipe without one.

    Args:
        source: the wide checkpoint; its weights are read only with statistics.
        recipe: whose method may have a budget.
        overrides: components that are settled.
        output_format: whose dialect must have a form for each scheme.
        statistics: how much each error hurts: ``sum h_i (w_i - w'_i)**2`` over ``sum h_i w_i**2``, the share of a
            linear's output that is lost. None: what the formats cost on Gaussian weights, alike for all.
        sensitivity: the map that a recipe which chooses by divergence needs.
        threads: for the measurement.
        progress: of the measurement: bytes done, bytes in all, what is measured.

    Raises:
        RecipeError: the budget cannot be met, a scheme cannot be expressed, or what the recipe chooses by is not there.
    """
    method = recipe.method
    _refuse_map(recipe, sensitivity)
    if not isinstance(method, Auto):
        return {}
    from omnifp4.algorithms.budget import Choice, allocate

    dialect = (output_format if output_format.dialect else OutputFormat.MODELOPT).dialect
    assert dialect is not None
    unknown = [s for s in method.schemes if s not in (Scheme.NVFP4, Scheme.WIDE) and s not in dialect.coded_forms]
    if unknown:
        raise RecipeError(
            f"format {output_format} has no form for {unknown[0]}, which recipe {recipe.name!r} may choose"
        )
    if sensitivity is not None:
        check_map(sensitivity, source.checkpoint)
    groups = _groups(source, recipe, overrides, method.counted)
    if not groups:
        raise RecipeError(f"recipe {recipe.name!r} with these components leaves no linear for its budget to decide")
    counted = sum(group.parameters * group.share for group in groups)
    costs = {
        group.name: {scheme: _bits(group, scheme, output_format) * group.share for scheme in method.schemes}
        for group in groups
    }
    # Before anything is measured, which takes hours at full size.
    least = sum(min(costs[group.name].values()) for group in groups)
    if least > method.effective_bits * counted * (1 + 1e-12):
        bits = math.ceil(1000 * least / counted) / 1000
        raise RecipeError(
            f"{method.effective_bits:g} effective bits cannot be met: the smallest formats of recipe {recipe.name!r} take "
            f"{bits:g} bits a weight here",
            hint=f"--effective-bits {bits:g} or more",
        )
    measured = tuple(dict.fromkeys((Scheme.NVFP4, *method.schemes)))
    losses = _measure(source, groups, measured, recipe.rule, method.score, statistics, threads, progress)
    if sensitivity is not None:
        losses = by_divergence(groups, losses, sensitivity)
    choices = {
        name: [Choice(scheme, cost, losses[name][scheme]) for scheme, cost in own.items()]
        for name, own in costs.items()
    }
    chosen = allocate(choices, method.effective_bits * counted)
    return {tensor.spec.name: chosen[group.name].scheme for group in groups for tensor in group.tensors}


def _refuse_map(recipe: Recipe, sensitivity: SensitivityReceipt | None) -> None:
    needs_map = isinstance(recipe.method, Auto) and recipe.method.score is Score.KL
    if sensitivity is not None and not needs_map:
        raise RecipeError(
            f"recipe {recipe.name!r} does not choose by divergence, so a sensitivity map has no use",
            hint="leave it out, or --recipe nvfp4-auto --choose-by kl",
        )
    if sensitivity is None and needs_map:
        raise RecipeError(
            f"recipe {recipe.name!r} chooses by divergence and needs a map of it",
            hint=f"add --sensitivity FILE; {MAP_HINT}",
        )


def _groups(source: Source, recipe: Recipe, overrides: Mapping[str, Scheme], counted: Counted) -> list[Group]:
    schemes = choose_schemes(source.layout, recipe, overrides)
    members: dict[str, list[SourceTensor]] = {}
    for tensor in source.tensors:
        spec, component = tensor.spec, tensor.spec.component
        settled = component.name in overrides or component.part.value in overrides
        # What the recipe itself gives another scheme is settled too.
        settled = settled or schemes[component] is not Scheme.NVFP4
        if not spec.is_linear or settled or spec.shape[1] % Scheme.NVFP4.width_multiple:
            continue
        members.setdefault(_group_name(tensor), []).append(tensor)
    groups = []
    for name, tensors in members.items():
        component = tensors[0].spec.component
        routed = counted is Counted.READ and component.kind is Kind.EXPERTS
        groups.append(Group(name, tuple(tensors), _active_share(source, component, tensors) if routed else 1.0))
    return groups


def _group_name(tensor: SourceTensor) -> str:
    spec = tensor.spec
    if spec.component.kind is Kind.EXPERTS:
        # Kernels run all experts of a layer in one format.
        return spec.name.rpartition(".experts.")[0] + ".experts"
    return spec.scale_group or spec.name


def _active_share(source: Source, component: Component, tensors: list[SourceTensor]) -> float:
    """Experts that a token reads, over all experts."""
    experts = len({tensor.spec.name.rsplit(".", 2)[0] for tensor in tensors})
    config: Any = source.checkpoint.config
    path = ("talker_config", "text_config") if component.part is Part.TALKER else ("thinker_config", "text_config")
    for key in path:
        inner = config.get(key)
        config = inner if isinstance(inner, dict) else config
    value = config.get("num_experts_per_tok", DEFAULT_EXPERTS_PER_TOKEN)
    if not isinstance(value, int) or not 1 <= value <= experts:
        raise RecipeError(
            f"config: num_experts_per_tok is {value!r}: 1 to {experts} is needed to count bits that are read"
        )
    return value / experts


def _bits(group: Group, scheme: Scheme, output_format: OutputFormat) -> float:
    form = output_format if output_format.dialect else OutputFormat.MODELOPT
    if scheme.is_wide:
        return 8.0 * sum(tensor.nbytes for tensor in group.tensors)
    return 8.0 * sum(
        byte_count(stored.dtype, stored.shape)
        for tensor in group.tensors
        for stored in stored_tensors(tensor, scheme, form)
    )


def _measure(
    source: Source,
    groups: list[Group],
    schemes: tuple[Scheme, ...],
    rule: ScaleRule,
    score: Score,
    statistics: Statistics | None,
    threads: int,
    progress: Progress | None,
) -> dict[str, dict[Scheme, float]]:
    """Loss of every group in every scheme: nats by gradients, or the lost share of the output of each kind of linear in it,
    summed."""
    if statistics is None:
        expected = {Scheme.NVFP4: EXPECTED_RELATIVE_ERROR[rule], Scheme.WIDE: 0.0} | coded.EXPECTED_RELATIVE_ERROR
        return {group.name: {scheme: expected[scheme] for scheme in schemes} for group in groups}
    total = sum(tensor.nbytes for group in groups for tensor in group.tensors)
    done = 0
    losses: dict[str, dict[Scheme, float]] = {}
    with CheckpointReader(source.checkpoint) as reader, ThreadPoolExecutor(threads) as pool:
        by_gradient = score is Score.GRADIENT
        losses_of = _gradient_losses if by_gradient else _tensor_losses

        def look(tensor: SourceTensor) -> dict[Scheme, tuple[float, float]]:
            return losses_of(tensor, reader, schemes, rule, statistics)

        for group in groups:
            # Gate, up and down each count as one linear, however many experts share the work.
            kinds: dict[str, dict[Scheme, list[float]]] = {}
            for tensor, found in zip(group.tensors, pool.map(look, group.tensors), strict=True):
                kind = kinds.setdefault(tensor.spec.module.rpartition(".")[2], {})
                for scheme, (error, energy) in found.items():
                    sums = kind.setdefault(scheme, [0.0, 0.0])
                    sums[0] += error
                    sums[1] += energy
                done += tensor.nbytes
                if progress:
                    progress(done, total, f"measuring {group.name}")
            losses[group.name] = {
                scheme: sum(
                    kind[scheme][0] if by_gradient else kind[scheme][0] / (kind[scheme][1] or 1.0)
                    for kind in kinds.values()
                )
                for scheme in schemes
            }
    return losses


def _tensor_losses(
    tensor: SourceTensor,
    reader: CheckpointReader,
    schemes: tuple[Scheme, ...],
    rule: ScaleRule,
    statistics: Statistics,
) -> dict[Scheme, tuple[float, float]]:
    """Output error and output energy of one weight in every scheme, times the tokens that it saw."""
    wide = widen(tensor.read(reader), tensor.entry.dtype)
    name = tensor.spec.name
    importance: Float32Array = np.ones(wide.shape[1], dtype=np.float32)
    if name in statistics:
        importance = statistics.of(name).square_mean.numpy()
    tokens = max(1, statistics.tokens(name))
    energy = tokens * float((np.square(wide, dtype=np.float64) @ importance).sum())
    result = {}
    for scheme in schemes:
        difference = np.zeros_like(wide) if scheme.is_wide else _rounded(wide, scheme, rule) - wide
        result[scheme] = (tokens * float((np.square(difference, dtype=np.float64) @ importance).sum()), energy)
    return result


def _gradient_losses(
    tensor: SourceTensor,
    reader: CheckpointReader,
    schemes: tuple[Scheme, ...],
    rule: ScaleRule,
    statistics: Statistics,
) -> dict[Scheme, tuple[float, float]]:
    """The divergence in nats that one weight in every scheme is estimated to cause: ``sum F (w - w')**2 / 2``; and 1."""
    gradient = statistics.gradient(tensor.spec.name)
    rows, columns = gradient.rows.double().numpy(), gradient.columns.double().numpy()
    whole = rows.sum()
    wide = widen(tensor.read(reader), tensor.entry.dtype)
    result = {}
    for scheme in schemes:
        nats = 0.0
        if not scheme.is_wide and whole:
            squares = np.square(_rounded(wide, scheme, rule) - wide, dtype=np.float64)
            nats = float(rows @ squares @ columns / whole / 2)
        result[scheme] = nats, 1.0
    return result


def _rounded(wide: Float32Array, scheme: Scheme, rule: ScaleRule) -> Float32Array:
    if scheme is not Scheme.NVFP4:
        return coded.decode(coded.encode(wide, scheme, rule))
    from omnifp4.formats import fast_cpu

    return fast_cpu.decode(fast_cpu.encode(wide, "F32", rule)[0])
