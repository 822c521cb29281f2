"""What a checkpoint is made of, told from its config and tensor names alone.

A `Layout` lists every tensor of a checkpoint under its **checkpoint name** (the name on disk in the released
checkpoints, never a module name in memory), with its shape, the component it belongs to, whether an engine could
read it as NVFP4, and the group of tensors that must share one tensor scale because kernels fuse them.
No model is built and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any

Config = Mapping[str, Any]

BUFFER_ENDINGS = (
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "rotary_pos_emb.inv_freq",
    "rotary_embed.inv_freq",
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    "audio_tower.positional_embedding.positional_embedding",
    "code2wav.code_offset",
    ".upsample.filter",
    ".downsample.filter",
)
"""Ends of names of tensors that some exporters write though every loader computes them anew from the config: rotary
frequencies, position numbers, sinusoids, codebook offsets, resampling filters. They are in no layout."""


class Part(StrEnum):
    """The model that a tensor belongs to."""

    THINKER = "thinker"
    """The text decoder that understands and writes: of an omni model, of a vision-language model, or alone."""
    AUDIO_TOWER = "audio_tower"
    VISION_TOWER = "vision_tower"
    TALKER = "talker"
    CODE_PREDICTOR = "code_predictor"
    CODE2WAV = "code2wav"


class Kind(StrEnum):
    """What a tensor does inside its part."""

    ATTENTION = "attention"
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared_experts"
    MLP = "mlp"
    ROUTER = "router"
    NORMS = "norms"
    EMBEDDINGS = "embeddings"
    HEAD = "head"
    PROJECTIONS = "projections"
    WEIGHTS = "weights"
    """Everything in a part that is treated as a whole (towers, code predictor, vocoder)."""


@dataclass(frozen=True, slots=True)
class Component:
    """A set of tensors that a recipe treats alike, and that `plan` shows as one row.

    Attributes:
        part: the model it belongs to.
        kind: what it does there.
        why_wide: why no default recipe quantizes it, as a clause for people ("picks the experts: …");
            empty where a recipe may quantize it without being asked to.
    """

    part: Part
    kind: Kind
    why_wide: str = ""

    @property
    def name(self) -> str:
        """The name used on the command line, such as ``thinker.experts`` or ``audio_tower``."""
        return self.part.value if self.kind is Kind.WEIGHTS else f"{self.part.value}.{self.kind.value}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a checkpoint has, or may have.

    Attributes:
        name: checkpoint name, such as ``thinker.model.layers.0.self_attn.q_proj.weight``.
        shape: the shape in the wide checkpoint; a linear's weight is ``(out_features, in_features)``.
        component: where it belongs.
        is_linear: it is the 2-D weight of a bias-free or biased linear layer, the only thing NVFP4 can hold.
        scale_group: key shared by the tensors that must have one tensor scale (q/k/v of a layer; gate/up of an
            expert, of a shared expert, of a dense MLP); empty if the tensor stands alone.
        optional: a right checkpoint may lack it (buffers that some exporters write, tied heads).
    """

    name: str
    shape: tuple[int, ...]
    component: Component
    is_linear: bool = False
    scale_group: str = ""
    optional: bool = False

    @property
    def module(self) -> str:
        """The name without its last part: what engines list in ``ignore``."""
        return self.name.rpartition(".")[0]

    @property
    def parameters(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """A 3-D tensor that some checkpoints store in place of one tensor per expert.

    Attributes:
        name: checkpoint name, such as ``thinker.model.layers.0.mlp.experts.gate_up_proj``.
        shape: its shape on disk; the first dimension counts experts. The same name may occur in two forms, one
            transposed: `Layout.fused_form` tells them apart by shape.
        parts: for each projection inside, in order along the output dimension: ``"gate_proj"`` and ``"up_proj"``,
            or ``"down_proj"`` alone. Each part takes an equal share of the output dimension.
        transposed: each expert is stored ``(in_features, out_features)`` instead of ``(out, in)``.
        expert_prefix: name of expert M's module is ``f"{expert_prefix}.{M}.{part}"``.
    """

    name: str
    shape: tuple[int, int, int]
    parts: tuple[str, ...]
    transposed: bool
    expert_prefix: str

    def expert_tensor(self, expert: int, part: str) -> str:
        return f"{self.expert_prefix}.{expert}.{part}.weight"


@dataclass(frozen=True)
class Layout:
    """Every tensor of one checkpoint, as its config says it should be.

    Attributes:
        model_type: of the config.
        tensors: in the order of the forward pass.
        fused: the 3-D forms that may stand on disk instead of the per-expert tensors of the same projections; of
            two forms with one name, the one of the released checkpoints comes first.
        routed_experts: number of experts per MoE layer of the thinker (0 for a dense model).
        notes: what the config decided that a person may want to know.
    """

    model_type: str
    tensors: tuple[TensorSpec, ...]
    fused: tuple[FusedExperts, ...] = ()
    routed_experts: int = 0
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def fused_by_name(self) -> dict[str, FusedExperts]:
        """The form of the released checkpoints, for each name; `fused_form` decides by shape."""
        first: dict[str, FusedExperts] = {}
        for fused in self.fused:
            first.setdefault(fused.name, fused)
        return first

    @cached_property
    def fused_names(self) -> tuple[str, ...]:
        """The names under which 3-D tensors may stand on disk, each once."""
        return tuple(self.fused_by_name)

    def fused_shapes(self, name: str) -> tuple[tuple[int, int, int], ...]:
        """The shapes that the 3-D tensor `name` may have on disk, the released one first."""
        return tuple(dict.fromkeys(fused.shape for fused in self.fused if fused.name == name))

    @cached_property
    def _fused_forms(self) -> dict[str, tuple[FusedExperts, ...]]:
        forms: dict[str, list[FusedExperts]] = {}
        for fused in self.fused:
            forms.setdefault(fused.name, []).append(fused)
        return {name: tuple(found) for name, found in forms.items()}

    @cached_property
    def _fused_siblings(self) -> dict[str, tuple[str, ...]]:
        siblings: dict[str, list[str]] = {}
        for name, fused in self.fused_by_name.items():
            siblings.setdefault(fused.expert_prefix, []).append(name)
        return {prefix: tuple(names) for prefix, names in siblings.items()}

    def fused_form(
        self, name: str, shape: Iterable[int], shapes: Mapping[str, Iterable[int]] = MappingProxyType({})
    ) -> FusedExperts | None:
        """The form of the 3-D tensor `name` that has `shape` on disk, or None where there is no such form.

        Where the experts are square in it, both orientations have this shape. `shapes` of the checkpoint's other
        tensors then settle it: gate_up and down of a layer are never both square. Without them the released
        orientation is taken.
        """
        found = self._forms_of_shape(name, shape)
        if len(found) < 2:
            return found[0] if found else None
        for sibling in self._fused_siblings[found[0].expert_prefix]:
            if sibling != name and sibling in shapes:
                told = self._forms_of_shape(sibling, shapes[sibling])
                if len(told) == 1:
                    return next((form for form in found if form.transposed == told[0].transposed), found[0])
        return found[0]

    def _forms_of_shape(self, name: str, shape: Iterable[int]) -> list[FusedExperts]:
        on_disk = tuple(shape)
        return [form for form in self._fused_forms.get(name, ()) if form.shape == on_disk]

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """The components that have tensors, in order of first appearance."""
        return tuple(dict.fromkeys(tensor.component for tensor in self.tensors))

    @cached_property
    def scale_groups(self) -> dict[str, tuple[TensorSpec, ...]]:
        """Tensors that share a tensor scale, by group key; tensors that stand alone are not listed."""
        groups: dict[str, list[TensorSpec]] = {}
        for tensor in self.tensors:
            if tensor.scale_group:
                groups.setdefault(tensor.scale_group, []).append(tensor)
        return {key: tuple(members) for key, members in groups.items()}

    def missing(self, names: Iterable[str]) -> list[str]:
        """Names of tensors that are needed and neither in `names` nor inside a fused tensor there.

        It reads names alone; whether a fused tensor has a shape that can be read, `fused_form` tells.
        """
        present = set(names)
        for name in list(present):
            if fused := self.fused_by_name.get(name):
                present.update(fused.expert_tensor(e, p) for e in range(fused.shape[0]) for p in fused.parts)
        return [t.name for t in self.tensors if not t.optional and t.name not in present]

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that this layout has no place for; buffers that loaders compute anew are tolerated."""
        known, fused = self.by_name, self.fused_by_name
        return [name for name in names if name not in known and name not in fused and not is_buffer(name)]


def is_buffer(name: str) -> bool:
    """Whether `name` is a buffer that loaders compute anew: it may be copied, and it may be left out."""
    return name.endswith(BUFFER_ENDINGS)
