"""Rounding the linears of one tensor scale by a recipe's method, with what is known of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from omnifp4.algorithms.errors import diagonal_blocks, errors_of_rows, scaled_blocks
from omnifp4.algorithms.gptq import gptq
from omnifp4.algorithms.grid import Codes, decode, encode, tensor_scales
from omnifp4.algorithms.scales import choose_block_scales, choose_clipped_scales
from omnifp4.algorithms.signround import signround
from omnifp4.algorithms.svdquant import LowRank, svdquant
from omnifp4.formats.nvfp4 import EncodeStats, Float32Array, ScaleRule, UInt8Array
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
        values: what they stand for, the branch added, float32 ``[out, in]``, where the arithmetic was done.
        stats: squared error and energy of the weight.
        branch: BF16 bits of up ``[out, r]`` and down ``[r, in]``.
        damping: that the Hessian needed; None where none was inverted.
        output: squared error of the outputs, that of the data-free rule, and the outputs' energy: means over tokens. None
            where nothing is known of the inputs.
    """

    packed: UInt8Array
    block_scale: UInt8Array
    values: Tensor
    stats: EncodeStats
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
    found: list[Rounded] = []
    for lot in _lots(list(zip(subjects, weights, strict=True)), recipe, inputs):
        known = inputs is not None and inputs.source(lot[0][0].name) != "none"
        found += _round(lot, scale, recipe, rule, inputs if known else None)
    return np.float32(scale.item()), found


def _lots(
    pairs: Sequence[tuple[Subject, Tensor]], recipe: Recipe, inputs: KnownInputs | None
) -> Iterator[list[tuple[Subject, Tensor]]]:
    """What is rounded together: GPTQ rounds each row by itself, so weights of the same inputs share one factor."""
    if not isinstance(recipe.method, Gptq) or inputs is None:
        yield from ([pair] for pair in pairs)
        return
    for _, lot in groupby(pairs, lambda pair: inputs.bank(pair[0].name)):
        yield list(lot)


def _round(
    lot: Sequence[tuple[Subject, Tensor]], scale: Tensor, recipe: Recipe, rule: ScaleRule, inputs: KnownInputs | None
) -> list[Rounded]:
    if inputs is None:
        return [_round_blindly(weight, scale, recipe, rule) for _, weight in lot]
    subject = lot[0][0]
    weight = lot[0][1] if len(lot) == 1 else torch.cat([one for _, one in lot])
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
    values = _values(rounded, branch)
    rows = [len(one) for _, one in lot]
    outputs = knowledge.errors(rows, values - weight, knowledge.data_free_error(weight, scale, rule), weight)
    parts = (torch.split(part, rows) for part in (rounded.codes, rounded.block_scale, values))
    return [
        _finished(one, Codes(own, block_scale, scale), value, branch, damping, (errors[0], errors[1], errors[2]))
        for (_, one), (own, block_scale, value), errors in zip(lot, zip(*parts, strict=True), outputs, strict=True)
    ]


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
        rounded = nearest(weight)
        return _finished(weight, rounded, decode(rounded), None, None, None)
    even = torch.eye(weight.shape[1], device=weight.device)
    split = svdquant(weight, even, nearest, rank=recipe.method.rank, rounds=recipe.method.rounds)
    return _finished(weight, split.rounded, _values(split.rounded, split.branch), split.branch, None, None)


def _values(rounded: Codes, branch: LowRank | None) -> Tensor:
    return decode(rounded) + branch.product() if branch else decode(rounded)


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

    def errors(self, rows: Sequence[int], *differences: Tensor) -> list[list[float]]:
        """Mean squared outputs of differences, the rows' fold undone, for each so many rows: one list for each of these."""
        whole = differences if self._rows is None else [one * self._rows[:, None] for one in differences]
        found = torch.stack([errors_of_rows(one, self.hessian) for one in whole], dim=1)
        sums = torch.stack([part.sum(dim=0) for part in torch.split(found, list(rows))])
        lists: list[list[float]] = sums.tolist()
        return lists


def _finished(
    weight: Tensor,
    rounded: Codes,
    values: Tensor,
    branch: LowRank | None,
    damping: float | None,
    output: tuple[float, float, float] | None,
) -> Rounded:
    halves = None
    if branch is not None:
        up, down = (part.contiguous().cpu().view(torch.uint16).numpy() for part in branch)
        halves = (up, down)
    # Packed and summed where they are: codes and scales alone come to the host.
    packed = rounded.codes[:, 0::2] | (rounded.codes[:, 1::2] << 4)
    wide = weight.double()
    sums = torch.stack([(wide - values).square().sum(), wide.square().sum()]).tolist()
    return Rounded(
        packed=packed.cpu().numpy(),
        block_scale=np.ascontiguousarray(rounded.block_scale.cpu().numpy()),
        values=values,
        stats=EncodeStats(*sums),
        branch=halves,
        damping=damping,
        output=output,
    )
