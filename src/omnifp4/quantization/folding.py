"""Finding AWQ's factors for the channels of a layer, and which tensors they are folded into.

The output of a norm is read by several linears: that of ``input_layernorm`` by q, k and v; that of
``post_attention_layernorm`` by the router, by gate and up of every expert, of the shared expert and by that one's gate.
All of them get the same factors, or the model would no longer be the same; so the factors are those that are best for
all rounded readers together, each weighed by the tokens that it sees. The inner channels of an MLP or expert are read
by its own down projection alone and go into the rows of its up projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from omnifp4.checkpoint.folds import Fold, Int8Array
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.formats.scheme import Scheme
from omnifp4.formats.widening import narrow, widen
from omnifp4.models.source import SourceTensor
from omnifp4.quantization.decisions import Decision
from omnifp4.quantization.inputs import KnownInputs
from omnifp4.quantization.method import Awq
from omnifp4.quantization.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

LAYER: Final = re.compile(r"(?P<layer>.*\.?layers\.\d+)\.(?P<rest>.*)")
DOWN: Final = ".down_proj.weight"
UP: Final = ".up_proj.weight"
READERS_OF_ATTENTION_NORM: Final = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")


@dataclass(frozen=True)
class FoldPlace:
    """Channels that may be scaled.

    Attributes:
        layer: checkpoint name of its layer.
        origin: what makes the channels: a norm's weight, or an up projection.
        vectors: biases that go with the origin.
        rounded: readers that become NVFP4, those of one kernel together.
        wide: readers that stay wide.
    """

    layer: str
    origin: SourceTensor
    vectors: tuple[SourceTensor, ...]
    rounded: tuple[tuple[SourceTensor, ...], ...]
    wide: tuple[SourceTensor, ...]

    @property
    def readers(self) -> tuple[SourceTensor, ...]:
        """All of them."""
        return (*(tensor for group in self.rounded for tensor in group), *self.wide)


def fold_places(decisions: Sequence[Decision]) -> dict[str, list[FoldPlace]]:
    """Where factors may be folded, by layer: where every reader is NVFP4, or wide and a tensor of its own."""
    layers: dict[str, dict[str, Decision]] = {}
    for decision in decisions:
        if match := LAYER.fullmatch(decision.spec.name):
            layers.setdefault(match["layer"], {})[match["rest"]] = decision
    places: dict[str, list[FoldPlace]] = {}
    for layer, members in layers.items():
        found = [place for place in _places(layer, members) if place is not None]
        if found:
            places[layer] = found
    return places


def _places(layer: str, members: Mapping[str, Decision]) -> Iterator[FoldPlace | None]:
    # Inner channels first: the rows of up are then settled when its columns are judged.
    for rest, down in members.items():
        if rest.endswith(DOWN) and (up := members.get(rest.removesuffix(DOWN) + UP)):
            bias = members.get(rest.removesuffix(DOWN) + ".up_proj.bias")
            yield _place(layer, up, [bias] if bias else [], [down])
    if norm := members.get("input_layernorm.weight"):
        yield _place(layer, norm, [], [members[name] for name in READERS_OF_ATTENTION_NORM if name in members])
    if norm := members.get("post_attention_layernorm.weight"):
        width = norm.spec.shape[0]
        readers = [
            decision
            for rest, decision in members.items()
            if rest.startswith("mlp.") and decision.spec.is_linear and not rest.endswith(DOWN)
        ]
        if all(reader.spec.shape[1] == width for reader in readers):
            yield _place(layer, norm, [], readers)


def _place(layer: str, origin: Decision, vectors: list[Decision], readers: list[Decision]) -> FoldPlace | None:
    groups: dict[str, list[SourceTensor]] = {}
    wide = []
    for reader in readers:
        if reader.scheme is Scheme.NVFP4:
            groups.setdefault(reader.spec.scale_group or reader.spec.name, []).append(reader.tensor)
        elif reader.scheme.is_wide and reader.tensor.fused is None:
            wide.append(reader.tensor)
        else:
            return None
    whole = origin.scheme is Scheme.NVFP4 or (origin.scheme.is_wide and origin.tensor.fused is None)
    if not groups or not whole:
        return None
    rounded = tuple(tuple(group) for group in groups.values())
    return FoldPlace(layer, origin.tensor, tuple(vector.tensor for vector in vectors), rounded, tuple(wide))


def find_fold(
    place: FoldPlace, reader: CheckpointReader, inputs: KnownInputs, recipe: Recipe, rule: ScaleRule
) -> Fold | None:
    """The best factors for one place; None where nothing is known, none help, or they would not fold exactly.

    Args:
        place: where.
        reader: of the wide checkpoint.
        inputs: what is known of the readers' inputs.
        recipe: whose method is AWQ.
        rule: by which the readers' block scales are chosen.
    """
    import torch

    from omnifp4.algorithms.awq import Reader, column_sizes, search_smoothing
    from omnifp4.algorithms.errors import diagonal_blocks, scaled_blocks
    from omnifp4.algorithms.grid import decode, encode, tensor_scales
    from omnifp4.quantization.rounding import block_scales_by

    known = [group for group in place.rounded if inputs.source(group[0].spec.name) != "none"]
    shares = {group[0].spec.name: float(inputs.tokens(group[0].spec.name)) for group in known}
    if not any(shares.values()):
        # Nobody was routed to any of them: what all tokens say counts alike for all.
        shares = dict.fromkeys(shares, 1.0)
    total = sum(shares.values())
    if not known or not total:
        return None
    abs_mean = torch.stack(
        [inputs.statistics(name).abs_mean.float() * (share / total) for name, share in shares.items()]
    ).sum(dim=0)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for group in known:
            name = group[0].spec.name
            if shares[name]:
                wide = [torch.from_numpy(widen(t.read(reader), t.entry.dtype)) for t in group]
                yield name, torch.cat(wide).to(inputs.device)

    readers = (
        Reader(weight, _what_is_known(inputs, name).to(inputs.device), shares[name] / total)
        for name, weight in weights()
    )
    sizes, rows = torch.zeros_like(abs_mean, dtype=torch.float64), 0
    for _, weight in weights():
        sizes += column_sizes(weight).to(sizes) * len(weight)
        rows += len(weight)

    method = recipe.method
    assert isinstance(method, Awq)
    # The clip search of AWQ full comes after the factors are found.
    searched = recipe.model_copy(update={"method": Awq()})

    def rounding(weight: Tensor, factors: Tensor, hessian: Tensor) -> Tensor:
        scale = tensor_scales(weight.abs().max(), rule)
        full = hessian.ndim == 2
        moved = hessian / (factors[:, None] * factors) if full else scaled_blocks(hessian, factors)
        chosen = block_scales_by(searched, weight, scale, rule, diagonal_blocks(moved) if full else moved)
        return decode(encode(weight, chosen, scale))

    found = search_smoothing(readers, abs_mean, sizes / rows, rounding, alphas=method.alphas)
    if found.alpha is None:
        return None
    exponents = found.factors.log2().round().to(torch.int8).cpu().numpy()
    untouched = (place.origin, *place.vectors, *place.wide)
    if not all(_folds_exactly(tensor, reader, exponents, tensor in place.wide) for tensor in untouched):
        return None
    return Fold(
        place.origin.spec.name,
        tuple(vector.spec.name for vector in place.vectors),
        tuple(tensor.spec.name for tensor in place.readers),
        exponents,
    )


def _what_is_known(inputs: KnownInputs, name: str) -> Tensor:
    """The full Hessian ``[in, in]``, or its blocks ``[in / 16, 16, 16]``, or those of its diagonal."""
    hessian = inputs.hessian(name)
    if hessian is not None:
        return hessian
    statistics = inputs.statistics(name)
    if statistics.block_hessian is not None:
        return statistics.block_hessian
    return statistics.square_mean.float().reshape(-1, 16).diag_embed()


def _folds_exactly(tensor: SourceTensor, reader: CheckpointReader, exponents: Int8Array, columns: bool) -> bool:
    """Whether a tensor that stays wide can be scaled without losing a bit."""
    if len(tensor.spec.shape) > 1 and not columns:
        # Rows of an up projection: rounded afterwards, from float32, or wide and in no danger at these exponents.
        return True
    wide = widen(tensor.read(reader), tensor.entry.dtype)
    moved = np.ldexp(wide, exponents.astype(np.int16) if columns else -exponents.astype(np.int16))
    return np.array_equal(widen(narrow(moved, tensor.entry.dtype), tensor.entry.dtype), moved)
