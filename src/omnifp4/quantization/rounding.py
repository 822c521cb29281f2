"""Rounding the linears of one tensor scale by a recipe's method, with what is known of their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from omnifp4.algorithms.errors import diagonal_blocks, error_under, scaled_blocks
from omnifp4.algorithms.gptq import gptq
from omnifp4.algorithms.grid import Codes, decode, encode, tensor_scales
from omnifp4.algorithms.scales import choose_block_scales, choose_clipped_scales
from omnifp4.algorithms.signround import signround
from omnifp4.algorithms.svdquant import LowRank, svdquant
from omnifp4.formats.nvfp4 import Float32Array, ScaleRule, UInt8Array, pack
from omnifp4.quantization.inputs import KnownInputs, need_hessian
from omnifp4.quantization.method import Awq, Gptq, Need, SignRound, SvdQuant, Weighting
from omnifp4.quantization.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Subject:
    """One weight to be rounded.

    Attributes:
        name: checkpoint name, under which its inputs are known.
        weight: float32 ``[out, in]``, folds applied.
        columns: what its columns were multiplied by, float32 ``[in]``; None: nothing.
        rows: what its rows were divided by, float32 ``[out]``; None: nothing.
    """

    name: str
    weight: Float32Array
    columns: Float32Array | None = None
    rows: Float32Array | None = None


@dataclass(frozen=True)
class Rounded:
    """What became of one weight.

    Attributes:
        packed: codes, uint8 ``[out, in / 2]``.
        block_scale: E4M3 bits, uint8 ``[out, in / 16]``.
        values: what they stand for, the branch added, float32 ``[out, in]``.
        branch: BF16 bits of up ``[out, r]`` and down ``[r, in]``.
        damping: that the Hessian needed; None where none was inverted.
        output: squared error of the outputs, that of the data-free rule, and the outputs' energy: means over tokens. None
            where nothing is known of the inputs.
    """

    packed: UInt8Array
    block_scale: UInt8Array
    values: Float32Array
    branch: tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]] | None
    damping: float | None
    output: tuple[float, float, float] | None


def round_group(
    subjects: Sequence[Subject], recipe: Recipe, rule: ScaleRule, inputs: KnownInputs | None
) -> tuple[np.float32, list[Rounded]]:
    """Round weights that share one tensor scale.

    Args:
        subjects: all weights of the group.
        recipe: whose method and weighting are used where inputs are known.
        rule: the scale rule.
        inputs: what is known; None, or ``none`` for a weight, means the data-free rule for it.

    Returns:
        The tensor scale, and the weights in order.

    Raises:
        ValueError: a weight is too large to encode.
        OmniFP4Error: the method needs full Hessians, and there is only a file.
    """
    device = inputs.device if inputs is not None else torch.device("cpu")
    weights = [torch.from_numpy(subject.weight).to(device) for subject in subjects]
    amax = torch.stack([weight.abs().max() for weight in weights]).max()
    scale = tensor_scales(amax, rule)
    found = []
    for subject, weight in zip(subjects, weights, strict=True):
        known = inputs is not None and inputs.source(subject.name) != "none"
        found.append(_round(subject, weight, scale, recipe, rule, inputs if known else None))
    return np.float32(scale.item()), found


def _round(
    subject: Subject, weight: Tensor, scale: Tensor, recipe: Recipe, rule: ScaleRule, inputs: KnownInputs | None
) -> Rounded:
    if inputs is None:
        return _round_blindly(weight, scale, recipe, rule)
    knowledge = _Knowledge(subject, recipe, inputs)
    blocks = knowledge.block_scales(weight, scale, rule)
    method, branch, damping = recipe.method, None, None
    if isinstance(method, Gptq):
        done = gptq(weight, knowledge.hessian, blocks, scale, damping=method.damping, columns=method.columns)
        rounded, damping = done.rounded, float(done.damping)
    elif isinstance(method, SignRound):
        learned = inputs.learned(subject.name)
        rounded = learned or signround(weight, knowledge.hessian, blocks, scale, steps=method.steps)
    elif isinstance(method, SvdQuant):

        def residual(left: Tensor) -> Codes:
            return encode(left, knowledge.block_scales(left, scale, rule), scale)

        split = svdquant(weight, knowledge.hessian, residual, rank=method.rank, rounds=method.rounds)
        rounded, branch = split.rounded, split.branch
    else:
        rounded = encode(weight, blocks, scale)
    values = decode(rounded) + branch.product() if branch else decode(rounded)
    output = (
        knowledge.error(values - weight),
        knowledge.error(knowledge.data_free_error(weight, scale, rule)),
        knowledge.error(weight),
    )
    return _finished(rounded, branch, damping, output)


def scales_of(
    subject: Subject, weight: Tensor, scale: Tensor, recipe: Recipe, rule: ScaleRule, inputs: KnownInputs
) -> Tensor:
    """The block scales of a weight whose inputs are known: E4M3 bits, uint8 ``[out, in / 16]``."""
    return _Knowledge(subject, recipe, inputs).block_scales(weight, scale, rule)


def block_scales_by(recipe: Recipe, weight: Tensor, scale: Tensor, rule: ScaleRule, blocks: Tensor) -> Tensor:
    """Block scales by a recipe's weighting, or by AWQ's clip search.

    Args:
        recipe: which of them.
        weight: float32 ``[out, in]``.
        scale: the tensor scale, float32 ``[]``.
        rule: the scale rule.
        blocks: 16 x 16 blocks of the Hessian, ``[in / 16, 16, 16]``.

    Returns:
        E4M3 bits, uint8 ``[out, in / 16]``.
    """
    if isinstance(recipe.method, Awq) and recipe.method.name == "awq-full":
        return choose_clipped_scales(weight, scale, blocks, rule)
    if recipe.weighting is Weighting.LOCAL_HESSIAN:
        return choose_block_scales(weight, scale, rule, block_hessian=blocks)
    if recipe.weighting is Weighting.IMPORTANCE:
        importance = blocks.diagonal(dim1=-2, dim2=-1).reshape(-1)
        return choose_block_scales(weight, scale, rule, importance=importance)
    return choose_block_scales(weight, scale, rule)


def _round_blindly(weight: Tensor, scale: Tensor, recipe: Recipe, rule: ScaleRule) -> Rounded:
    """The data-free rule; a branch that the recipe stores is the one that is nearest in the weights."""

    def nearest(left: Tensor) -> Codes:
        return encode(left, choose_block_scales(left, scale, rule), scale)

    if not isinstance(recipe.method, SvdQuant):
        return _finished(nearest(weight), None, None, None)
    even = torch.eye(weight.shape[1], device=weight.device)
    split = svdquant(weight, even, nearest, rank=recipe.method.rank, rounds=recipe.method.rounds)
    return _finished(split.rounded, split.branch, None, None)


class _Knowledge:
    """Inputs of one weight, in the coordinates of the folded weight."""

    def __init__(self, subject: Subject, recipe: Recipe, inputs: KnownInputs) -> None:
        self._recipe = recipe
        self._columns = None if subject.columns is None else torch.from_numpy(subject.columns).to(inputs.device)
        self._rows = None if subject.rows is None else torch.from_numpy(subject.rows).to(inputs.device)
        if recipe.need is Need.HESSIANS:
            known: Tensor | None = need_hessian(inputs, subject.name)
        else:
            known = inputs.hessian(subject.name)
        if known is None:
            statistics = inputs.statistics(subject.name)
            known = statistics.block_hessian
            if known is None:
                known = statistics.square_mean.float().reshape(-1, 16).diag_embed()
        known = known.to(inputs.device)
        if self._columns is not None:
            full = known.ndim == 2
            known = known / (self._columns[:, None] * self._columns) if full else scaled_blocks(known, self._columns)
        self.hessian = known

    @property
    def _blocks(self) -> Tensor:
        return diagonal_blocks(self.hessian) if self.hessian.ndim == 2 else self.hessian

    def block_scales(self, weight: Tensor, scale: Tensor, rule: ScaleRule) -> Tensor:
        """See `block_scales_by`."""
        return block_scales_by(self._recipe, weight, scale, rule, self._blocks)

    def data_free_error(self, weight: Tensor, scale: Tensor, rule: ScaleRule) -> Tensor:
        """What the data-free rule errs by on the weight as it was before the folds, in the folded coordinates."""
        folded: Tensor | None = None if self._columns is None else self._columns
        if self._rows is not None:
            folded = (1.0 if folded is None else folded) / self._rows[:, None]
        if folded is None:
            return decode(encode(weight, choose_block_scales(weight, scale, rule), scale)) - weight
        original = weight / folded
        own = tensor_scales(original.abs().max(), rule)
        return (decode(encode(original, choose_block_scales(original, own, rule), own)) - original) * folded

    def error(self, difference: Tensor) -> float:
        """Mean squared output of a difference, the rows' fold undone."""
        whole = difference if self._rows is None else difference * self._rows[:, None]
        return float(error_under(whole, self.hessian))


def _finished(
    rounded: Codes, branch: LowRank | None, damping: float | None, output: tuple[float, float, float] | None
) -> Rounded:
    values = decode(rounded) + branch.product() if branch else decode(rounded)
    halves = None
    if branch is not None:
        up, down = (part.contiguous().cpu().view(torch.uint16).numpy() for part in branch)
        halves = (up, down)
    return Rounded(
        packed=pack(rounded.codes.cpu().numpy()),
        block_scale=np.ascontiguousarray(rounded.block_scale.cpu().numpy()),
        values=values.cpu().numpy(),
        branch=halves,
        damping=damping,
        output=output,
    )
