"""Where each tensor of a quantized checkpoint goes in a model, told from headers; everything is checked here.

Names on disk are not those in memory, and those in memory changed between versions of Transformers. So each name is
sent through Transformers' own renaming, as if its weight were wide, and must arrive at a module of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from torch import nn

from omnifp4.checkpoint.artifact import find_coded, find_linears
from omnifp4.checkpoint.dialects import DIALECTS, CodedLinear, LinearEntries
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.errors import CheckpointError
from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.runtime.names import Renaming

EXPERT_NAME: Final = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj)$")
Source = TypeVar("Source", LinearEntries, CodedLinear)

PARTS: Final = ("gate_proj", "up_proj", "down_proj")

CACHE_SCALE: Final = re.compile(r"\.self_attn\.(?:[kqv]_proj\.)?(?:[kqv]_scale|kv_scale|output_scale)$")
"""Scales of a quantized KV cache. The cache stays wide here; they are kept only to be written back."""


@dataclass(frozen=True, slots=True)
class LinearPlace:
    """A packed linear: its module in memory and its tensors on disk."""

    module: str
    source: LinearEntries


@dataclass(frozen=True, slots=True)
class ExpertsPlace:
    """The packed experts of a layer; each of `gate`, `up` and `down` has one linear an expert, in order."""

    module: str
    gate: tuple[LinearEntries, ...]
    up: tuple[LinearEntries, ...]
    down: tuple[LinearEntries, ...]


@dataclass(frozen=True, slots=True)
class CodedPlace:
    """A linear in FP8, MXFP4 or INT8: its module in memory and its tensors on disk."""

    module: str
    source: CodedLinear


@dataclass(frozen=True, slots=True)
class CodedExpertsPlace:
    """The experts of a layer in FP8, MXFP4 or INT8; each of `gate`, `up` and `down` has one linear an expert, in order."""

    module: str
    gate: tuple[CodedLinear, ...]
    up: tuple[CodedLinear, ...]
    down: tuple[CodedLinear, ...]


@dataclass(frozen=True)
class Placement:
    """The packed part of a checkpoint.

    Attributes:
        linears, experts: what becomes packed modules of NVFP4.
        coded, coded_experts: what becomes modules of the other schemes.
        packed_names: every tensor on disk that belongs to them, or to parts that the model was built without: what
            Transformers' own loader shall not see.
        cache_scales: see `CACHE_SCALE`.
    """

    linears: tuple[LinearPlace, ...]
    experts: tuple[ExpertsPlace, ...]
    packed_names: frozenset[str]
    cache_scales: tuple[TensorEntry, ...] = field(default=())
    coded: tuple[CodedPlace, ...] = field(default=())
    coded_experts: tuple[CodedExpertsPlace, ...] = field(default=())

    @property
    def weights(self) -> list[str]:
        """Names in memory of the weights that become packed."""
        linears = [item.module for item in self.linears] + [item.module for item in self.coded]
        experts = [item.module for item in self.experts] + [item.module for item in self.coded_experts]
        parts = ("gate_up_proj", "down_proj")
        return [f"{module}.weight" for module in linears] + [f"{m}.{part}" for m in experts for part in parts]

    @property
    def sources(self) -> list[LinearEntries]:
        """All NVFP4 linears of the checkpoint that the model takes, expert by expert."""
        found = [place.source for place in self.linears]
        for place in self.experts:
            found += [*place.gate, *place.up, *place.down]
        return found


def tensors_of(source: LinearEntries) -> list[TensorEntry]:
    """The tensors on disk of one packed linear."""
    optional = (source.block_scale, source.tensor_scale, source.input_scale)
    return [source.packed, *(entry for entry in optional if entry is not None), *(source.branch or ())]


def rank_of(source: LinearEntries) -> int:
    """Rank of the branch beside a linear, 0 where there is none."""
    return 0 if source.branch is None else (source.branch.up.shape or (0,))[-1]


def place(model: nn.Module, tensors: Mapping[str, TensorEntry], renaming: Renaming, subject: str) -> Placement:
    """Find the module of every packed linear.

    Args:
        model: on the meta device, with its wide modules.
        tensors: of the checkpoint.
        renaming: Transformers' renaming for this model.
        subject: the checkpoint, for messages.

    Raises:
        CheckpointError: a scale or an expert is missing, a shape does not fit, or a packed tensor has no module.
    """
    sources, others = find_linears(tensors), find_coded(tensors)
    if not sources and not others:
        raise CheckpointError(f"{subject}: quantization_config announces NVFP4, yet no tensor holds NVFP4 codes")
    names: set[str] = set()
    linears: list[LinearPlace] = []
    experts: dict[str, dict[tuple[int, str], LinearEntries]] = {}
    for name, source in sources.items():
        names.update(entry.name for entry in tensors_of(source))
        if renaming.is_left_out(name):
            continue
        _check_tensors(source, tensors, subject)
        match = EXPERT_NAME.fullmatch(name)
        if match is None:
            linears.append(LinearPlace(_linear_module(model, name, source, renaming, subject), source))
        else:
            experts.setdefault(match["experts"], {})[int(match["number"]), match["part"]] = source
    layers = tuple(_experts_place(model, name, found, renaming, subject) for name, found in experts.items())
    coded, coded_experts = _place_coded(model, others, renaming, subject)
    names.update(entry.name for source in others.values() for entry in source.entries)
    scales = tuple(entry for name, entry in tensors.items() if CACHE_SCALE.search(name) and name not in names)
    names.update(entry.name for entry in scales)
    names.update(name for name in tensors if renaming.is_left_out(name))
    _check_orphans(tensors, names, subject)
    return Placement(tuple(linears), layers, frozenset(names), scales, coded, coded_experts)


def _place_coded(
    model: nn.Module, sources: Mapping[str, CodedLinear], renaming: Renaming, subject: str
) -> tuple[tuple[CodedPlace, ...], tuple[CodedExpertsPlace, ...]]:
    linears: list[CodedPlace] = []
    experts: dict[str, dict[tuple[int, str], CodedLinear]] = {}
    for name, source in sources.items():
        if renaming.is_left_out(name):
            continue
        if problem := next(iter(source.problems()), ""):
            raise CheckpointError(f"{subject}/{source.codes.shard}: {problem}")
        match = EXPERT_NAME.fullmatch(name)
        if match is None:
            linears.append(CodedPlace(_linear_module(model, name, source, renaming, subject), source))
        else:
            experts.setdefault(match["experts"], {})[int(match["number"]), match["part"]] = source
    places = []
    for name, found in experts.items():
        path, parts = _experts_parts(model, name, found, renaming, subject)
        first = parts[0][0]
        for source in (source for part in parts for source in part):
            if _kind_of(source) != _kind_of(first):
                raise CheckpointError(f"{subject}: {source.codes.name!r} is not of the form of {first.codes.name!r}")
        places.append(CodedExpertsPlace(path, *parts))
    return tuple(linears), tuple(places)


def _kind_of(source: CodedLinear) -> tuple[object, ...]:
    """What all experts of a module have in common."""
    assert source.scale is not None
    return source.scheme, source.codes.dtype, source.scale.dtype, source.scale.parameters == 1, bool(source.input_scale)


def _check_tensors(source: LinearEntries, tensors: Mapping[str, TensorEntry], subject: str) -> None:
    """The parts of one linear are there, of the right types and shapes."""
    dialect = next(d for d in DIALECTS.values() if d.reciprocal == source.reciprocal)
    scales = ((source.block_scale, dialect.block_scale_suffix), (source.tensor_scale, dialect.tensor_scale_suffix))
    for entry, suffix in scales:
        if entry is None:
            raise CheckpointError(
                f"{subject}: tensor '{source.module}{suffix}' is missing, without which {source.packed.name!r} means nothing"
            )
    rows, half = source.packed.shape if len(source.packed.shape) == 2 else (0, 0)
    if source.packed.dtype != "U8" or half % (BLOCK_SIZE // 2) or not rows:
        raise _misfit(source.packed, subject, "U8 [out, in / 2] with in a multiple of 16")
    assert source.block_scale is not None
    if source.block_scale.dtype != "F8_E4M3" or source.block_scale.shape != (rows, half * 2 // BLOCK_SIZE):
        raise _misfit(source.block_scale, subject, f"F8_E4M3 {[rows, half * 2 // BLOCK_SIZE]}")
    for entry in (source.tensor_scale, source.input_scale):
        if entry is not None and (entry.dtype != "F32" or entry.parameters != 1):
            raise _misfit(entry, subject, "F32 with one value")
    if source.branch is not None:
        rank = rank_of(source)
        for entry, shape in zip(source.branch, ((rows, rank), (rank, half * 2)), strict=True):
            if entry.dtype != "BF16" or entry.shape != shape or not rank:
                raise _misfit(entry, subject, f"BF16 {list(shape)}")


def _misfit(entry: TensorEntry, subject: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{subject}/{entry.shard}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, not {wanted}"
    )


def _linear_module(
    model: nn.Module, name: str, source: LinearEntries | CodedLinear, renaming: Renaming, subject: str
) -> str:
    path = renaming.target(f"{name}.weight").removesuffix(".weight")
    module = find_module(model, path)
    if not isinstance(module, nn.Linear):
        what = "no module" if module is None else f"a {type(module).__name__}, not a linear layer"
        raise CheckpointError(
            f"{subject}: {_codes_of(source).name!r} holds {_scheme_of(source)} codes, but {path!r} is {what} in the model"
        )
    _check_shape(source, (module.out_features, module.in_features), subject)
    return path


def _codes_of(source: LinearEntries | CodedLinear) -> TensorEntry:
    return source.packed if isinstance(source, LinearEntries) else source.codes


def _scheme_of(source: LinearEntries | CodedLinear) -> str:
    return "NVFP4" if isinstance(source, LinearEntries) else source.scheme.value.upper()


def _check_shape(source: LinearEntries | CodedLinear, shape: tuple[int, int], subject: str) -> None:
    codes = _codes_of(source)
    found = (codes.shape[0], codes.shape[1] * 2) if isinstance(source, LinearEntries) else source.shape
    if found != shape:
        raise CheckpointError(
            f"{subject}/{codes.shard}: tensor {codes.name!r} holds a weight of {list(found)} where the "
            f"model has {list(shape)}"
        )


def _experts_place(
    model: nn.Module,
    name: str,
    found: Mapping[tuple[int, str], LinearEntries],
    renaming: Renaming,
    subject: str,
) -> ExpertsPlace:
    path, parts = _experts_parts(model, name, found, renaming, subject)
    place = ExpertsPlace(path, *parts)
    _check_alike(place, subject)
    return place


def _experts_parts(
    model: nn.Module, name: str, found: Mapping[tuple[int, str], Source], renaming: Renaming, subject: str
) -> tuple[str, tuple[tuple[Source, ...], ...]]:
    """The module of a layer's experts, and for each of `PARTS` its linears, expert by expert."""
    path = renaming.target(f"{name}.gate_up_proj").removesuffix(".gate_up_proj")
    module = find_module(model, path)
    down = getattr(module, "down_proj", None)
    if module is None or not isinstance(down, nn.Parameter) or down.ndim != 3:
        raise CheckpointError(
            f"{subject}: {name!r} holds packed experts, but {path!r} is no experts module in the model"
        )
    _check_kind(module, path, subject)
    experts, hidden, inner = down.shape
    for number, _ in found:
        if number >= experts:
            raise CheckpointError(f"{subject}: expert '{name}.{number}' exceeds the {experts} of the model")
    projections: dict[str, tuple[Source, ...]] = {}
    for part in PARTS:
        if missing := next((number for number in range(experts) if (number, part) not in found), None):
            raise CheckpointError(f"{subject}: packed weight of '{name}.{missing}.{part}' is missing")
        if (0, part) not in found:
            raise CheckpointError(f"{subject}: packed weight of '{name}.0.{part}' is missing")
        projections[part] = tuple(found[number, part] for number in range(experts))
        for source in projections[part]:
            _check_shape(source, (hidden, inner) if part == "down_proj" else (inner, hidden), subject)
    return path, tuple(projections[part] for part in PARTS)


def _check_alike(place: ExpertsPlace, subject: str) -> None:
    """One module holds them, so all have an input scale or none, and all are of one dialect."""
    first = place.gate[0]
    for source in (*place.gate, *place.up, *place.down):
        if (source.input_scale is None) != (first.input_scale is None):
            lacking = source if source.input_scale is None else first
            raise CheckpointError(f"{subject}: '{lacking.module}' has no input scale though other experts have one")
        if source.reciprocal != first.reciprocal:
            raise CheckpointError(f"{subject}: {source.packed.name!r} is not of the dialect of {first.packed.name!r}")


def _check_kind(module: nn.Module, path: str, subject: str) -> None:
    expected: dict[str, Any] = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    for key, value in expected.items():
        if getattr(module, key, value) != value:
            raise CheckpointError(
                f"{subject}: experts {path!r} ({type(module).__name__}) have {key}={not value}: not supported"
            )


def _check_orphans(tensors: Mapping[str, TensorEntry], known: Iterable[str], subject: str) -> None:
    """Scales that belong to no packed weight tell that one is missing."""
    suffixes = {
        suffix
        for dialect in DIALECTS.values()
        for suffix in (dialect.block_scale_suffix, dialect.tensor_scale_suffix, dialect.input_scale_suffix)
    }
    known = set(known)
    for name in tensors:
        if name not in known and name.endswith((*suffixes, "_amax")):
            raise CheckpointError(f"{subject}: scale {name!r} belongs to no packed weight")


def find_module(model: nn.Module, path: str) -> nn.Module | None:
    """The module of that name, or None."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


Swap = Callable[[nn.Module], nn.Module]


def replace_module(model: nn.Module, path: str, swap: Swap) -> nn.Module:
    """Put what `swap` makes of a module in its place."""
    parent_path, _, name = path.rpartition(".")
    made = swap(model.get_submodule(path))
    setattr(model.get_submodule(parent_path), name, made)
    return made
