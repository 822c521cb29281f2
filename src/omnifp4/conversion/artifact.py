"""An NVFP4 artifact as convert and repair see it: files, layout, linears, and what the config claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from omnifp4.checkpoint.artifact import find_claims, find_coded, find_linears
from omnifp4.checkpoint.dialects import (
    DIALECTS,
    Activations,
    CodedLinear,
    Dialect,
    LinearEntries,
    QuantizationClaim,
)
from omnifp4.checkpoint.dtypes import WIDE_FLOATS
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.formats.scheme import Scheme
from omnifp4.models import layout_for
from omnifp4.models.base import Layout, TensorSpec

LEFTOVER_SUFFIXES = ("_amax", ".weight_zero_point", ".weight_g_idx", ".weight_shape")
"""Ends of names that quantizers leave beside their weights and no NVFP4 loader reads."""

CACHE_SCALE_SUFFIXES = (".k_scale", ".v_scale")
"""Ends of names of the scales of an FP8 key/value cache; in no layout, because no wide checkpoint has them."""

AUTO_ROUND = "auto-round"
"""quant_method of AutoRound's own config, over tensors named as in compressed-tensors."""


@dataclass(frozen=True)
class Artifact:
    """A quantized checkpoint, read but not judged.

    Attributes:
        checkpoint: config and headers.
        layout: what the config calls for.
        linears: every NVFP4 linear (its codes are bytes), by module.
        claims: every account of the quantization, the one where engines look first.
    """

    checkpoint: Checkpoint
    layout: Layout
    linears: Mapping[str, LinearEntries]
    claims: tuple[QuantizationClaim, ...]

    @cached_property
    def coded(self) -> dict[str, CodedLinear]:
        """The linears in FP8, MXFP4 and INT8, by module."""
        return find_coded(self.checkpoint.tensors)

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every quantized linear, by module, in layout order."""
        return {m: self.coded[m].scheme if m in self.coded else Scheme.NVFP4 for m in self.quantized_modules}

    @cached_property
    def dialect(self) -> Dialect:
        """The dialect of most NVFP4 linears' tensors; as the config says, or ModelOpt, where there is none."""
        if not self.linears and self.claim is not None and self.claim.dialect in DIALECTS:
            return DIALECTS[self.claim.dialect]
        divided = sum(linear.reciprocal for linear in self.linears.values())
        return DIALECTS["compressed-tensors" if 2 * divided > len(self.linears) else "modelopt"]

    @cached_property
    def claim(self) -> QuantizationClaim | None:
        """The first account, None where there is none."""
        return self.claims[0] if self.claims else None

    @cached_property
    def activations(self) -> Activations:
        """As the config claims; as the tensors have it where it does not say, or says it in AutoRound's words."""
        if self.claim is not None and self.claim.dialect in DIALECTS and not self.is_mixed:
            return self.claim.activations
        inputs = any(linear.input_scale is not None for linear in self.linears.values())
        return Activations.FP4 if inputs else Activations.WIDE

    @property
    def is_mixed(self) -> bool:
        """The config gives each layer its own algorithm."""
        return self.claim is not None and isinstance(self.claim.raw.get("quantized_layers"), dict)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The layout's linears by module."""
        return {spec.module: spec for spec in self.layout.tensors if spec.is_linear}

    @cached_property
    def parts(self) -> frozenset[str]:
        """Names of the tensors that make up quantized linears."""
        nvfp4 = (entry.name for linear in self.linears.values() for entry in linear_entries(linear))
        return frozenset(nvfp4) | {entry.name for linear in self.coded.values() for entry in linear.entries}

    @cached_property
    def logical_names(self) -> frozenset[str]:
        """Names as a wide checkpoint has them: a linear's weight in place of its parts."""
        names = set(self.checkpoint.tensors) - self.parts
        return frozenset(names | {f"{module}.weight" for module in (*self.linears, *self.coded)})

    @cached_property
    def quantized_modules(self) -> list[str]:
        """Modules of the quantized linears, in layout order."""
        modules = {**dict.fromkeys(self.linears), **dict.fromkeys(self.coded)}
        known = [module for module in self.specs if module in modules]
        return known + [module for module in modules if module not in self.specs]

    @cached_property
    def wide_modules(self) -> list[str]:
        """Modules of the linears that the files hold wide, in layout order; then unknown ones that may be linears."""
        present = set(self.checkpoint.tensors)
        shapes = {name: self.checkpoint.tensors[name].shape for name in self.layout.fused_names if name in present}
        for name, shape in shapes.items():
            if form := self.layout.fused_form(name, shape, shapes):
                present.update(form.expert_tensor(e, part) for e in range(form.shape[0]) for part in form.parts)
        quantized = {*self.linears, *self.coded}
        known = [m for m, spec in self.specs.items() if spec.name in present and m not in quantized]
        others = [
            name.removesuffix(".weight")
            for name in self.layout.unknown(self.checkpoint.tensors)
            if name.endswith(".weight") and name not in self.parts and self._may_be_linear(name)
        ]
        return known + others

    def _may_be_linear(self, name: str) -> bool:
        entry = self.checkpoint.tensors[name]
        return len(entry.shape) == 2 and entry.dtype in WIDE_FLOATS

    def unknown(self) -> list[str]:
        """Names of tensors that are in no layout and are no scales of a key/value cache."""
        return [name for name in self.layout.unknown(self.logical_names) if not name.endswith(CACHE_SCALE_SUFFIXES)]

    def scale_groups(self) -> Iterator[tuple[str, list[str]]]:
        """Key and modules of every set of NVFP4 linears that must share one tensor scale."""
        for key, members in self.layout.scale_groups.items():
            modules = [spec.module for spec in members if spec.module in self.linears]
            if len(modules) > 1:
                yield key, modules


def read_artifact(checkpoint: Checkpoint) -> Artifact:
    """Join files, layout and claims.

    Raises:
        ModelError: unknown model_type or unusable config.
    """
    linears = find_linears(checkpoint.tensors)
    packed = {module: linear for module, linear in linears.items() if linear.packed.dtype == "U8"}
    claims = tuple(find_claims(checkpoint.config, checkpoint.folder))
    return Artifact(checkpoint, layout_for(checkpoint.config, checkpoint.tensors), packed, claims)


def linear_entries(linear: LinearEntries) -> list[TensorEntry]:
    """The tensors of a linear that are there."""
    parts = (linear.packed, linear.block_scale, linear.tensor_scale, linear.input_scale)
    return [entry for entry in parts if entry is not None]


def in_file_order(checkpoint: Checkpoint) -> list[list[TensorEntry]]:
    """The tensors of each shard as they lie in it, shards by name."""
    shards: dict[str, list[TensorEntry]] = {shard: [] for shard in sorted(checkpoint.shard_bytes)}
    for entry in checkpoint.tensors.values():
        shards[entry.shard].append(entry)
    return [sorted(entries, key=lambda entry: entry.begin) for entries in shards.values()]
