"""The rounding of all linears of a decoder layer, learned together against what the layer gives (SignRound, block-wise)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from omnifp4.algorithms.grid import Codes, tensor_scales
from omnifp4.algorithms.signround import Rounding, Whole, signround_together
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.quantization.inputs import VisitedInputs
from omnifp4.quantization.recipe import Recipe
from omnifp4.quantization.rounding import Subject, scales_of
from omnifp4.runtime.stall import available_bytes

if TYPE_CHECKING:
    from omnifp4.calibration.hessians import LayerInputs, LayerRun

BATCH: Final = 8
"""Samples of one step."""

WEIGHT_BYTES: Final = 36
"""Of memory that a weight takes while its rounding is learned: itself, its place between two codes and their errors, its
offset, its gradient, and what a step makes of them."""


def round_layer(
    groups: Sequence[Sequence[Subject]],
    recipe: Recipe,
    rule: ScaleRule,
    inputs: VisitedInputs,
    layer: LayerInputs,
    *,
    steps: int,
    seed: int = 0,
    tell: Callable[[int], object] = lambda _: None,
) -> dict[str, Codes]:
    """Round the weights of one layer.

    Args:
        groups: weights that share one tensor scale, of all that becomes NVFP4 in the layer.
        recipe, rule: of their block scales.
        inputs: what is known of the layer's inputs.
        layer: with its runs.
        steps: of the descent.
        seed: of the choice of samples for each.
        tell: called with the steps that are done.

    Returns:
        Codes by weight name. Not in it are experts that too few tokens were sent to: what they would learn is chance. The
        layer has its own weights again.
    """
    roundings: dict[str, tuple[Tensor, Rounding]] = {}
    for group in groups:
        weights = [torch.from_numpy(subject.weight).to(inputs.device) for subject in group]
        scale = tensor_scales(torch.stack([weight.abs().max() for weight in weights]).max(), rule)
        for subject, weight in zip(group, weights, strict=True):
            if inputs.source(subject.name) == "routed":
                blocks = scales_of(subject, weight, scale, recipe, rule, inputs)
                roundings[subject.name] = weight, Rounding(weight, blocks, scale)
    if not roundings:
        return {}
    with _learning(layer, roundings):
        return signround_together(roundings, _Layer(layer, list(roundings), steps, seed), steps=steps, tell=tell)[0]


def fits(groups: Sequence[Sequence[Subject]], device: torch.device) -> bool:
    """Whether there is memory to learn the rounding of these weights together."""
    weights = sum(subject.weight.size for group in groups for subject in group)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    return free is None or weights * WEIGHT_BYTES <= free


@contextmanager
def _learning(layer: LayerInputs, names: Mapping[str, object]) -> Iterator[None]:
    """Inside, matrices of the layer have gradients; behind, its weights are its own again, bit for bit."""
    kept = {name: layer.weight(name).clone() for name in names}
    matrices = [parameter for parameter in layer.module.parameters() if parameter.ndim > 1]
    before = [parameter.requires_grad for parameter in matrices]
    try:
        for parameter in matrices:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, wanted in zip(matrices, before, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = None
        with torch.no_grad():
            for name, weight in kept.items():
                layer.weight(name).copy_(weight)


class _Layer(Whole):
    """A decoder layer, and how far what it gives is from what it gave with its own weights."""

    def __init__(self, layer: LayerInputs, names: Sequence[str], steps: int, seed: int) -> None:
        self._layer, self._names = layer, names
        generator = torch.Generator().manual_seed(seed)
        count = len(layer.runs)
        self._batches = [torch.randperm(count, generator=generator)[:BATCH].tolist() for _ in range(steps)]

    def put(self, name: str, weight: Tensor) -> None:
        """See `Whole.put`."""
        with torch.no_grad():
            self._layer.weight(name).copy_(weight)

    def loss(self) -> float:
        """See `Whole.loss`."""
        with torch.no_grad():
            return float(sum(_squared_error(self._layer.module, run).double() for run in self._layer.runs))

    def gradients(self, step: int) -> Mapping[str, Tensor]:
        """See `Whole.gradients`."""
        for parameter in self._layer.module.parameters():
            parameter.grad = None
        with torch.enable_grad():
            for number in self._batches[step]:
                _squared_error(self._layer.module, self._layer.runs[number]).backward()  # type: ignore[no-untyped-call]
        found = {name: self._layer.gradient(name) for name in self._names}
        return {name: gradient for name, gradient in found.items() if gradient is not None}


def _squared_error(module: nn.Module, run: LayerRun) -> Tensor:
    given = module(run.before, **run.named)
    given = given[0] if isinstance(given, tuple) else given
    error: Tensor = (given.float() - run.given.float()).square().sum()
    return error
