"""What a checkpoint is, from its config, headers and small files: the basis of every judgement here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.artifact import ENGINE_PLACE, find_claims, find_coded, find_linears
from omnifp4.checkpoint.branch import find_branches
from omnifp4.checkpoint.dialects import CodedLinear, LinearEntries, QuantizationClaim
from omnifp4.checkpoint.folder import Checkpoint, open_checkpoint
from omnifp4.errors import ModelError
from omnifp4.models import layout_for

STATISTICS: Final = ("_amax", "_zero_point", "._pre_quant_scale")
"""Ends of names of what calibration leaves beside the weights; no loader keeps it."""

FAKE_STATE: Final = "vllm_fq_modelopt_state.pth"

TEXT, TOWERS, SPEECH = "text decoder", "towers", "speech"
"""The parts that can be loaded or left out."""

_TOWER_PREFIXES: Final = ("thinker.audio_tower.", "thinker.visual.", "model.visual.", "visual.", "model.audio_tower.", "audio_tower.")  # fmt: skip
_SPEECH_PREFIXES: Final = ("talker.", "code2wav.", "token2wav.")


class Kind(StrEnum):
    """What a checkpoint's weights are."""

    WIDE = "wide"
    NVFP4 = "nvfp4"
    AMAX_ONLY = "amax-only"
    """Wide weights with calibration statistics beside them: 1.00x."""
    FAKE_QUANT = "fake-quant"
    """Wide weights rounded through NVFP4: 1.00x, on purpose."""
    CLAIM_ONLY = "claim-only"
    """The config says NVFP4, and no tensor is."""
    OTHER = "other"
    """Quantized in some other way."""


@dataclass(frozen=True)
class Facts:
    """A checkpoint, read but not judged."""

    checkpoint: Checkpoint
    claims: tuple[QuantizationClaim, ...]
    linears: Mapping[str, LinearEntries]

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        return self.checkpoint.config

    @property
    def folder(self) -> Path | None:
        """Where the files are; None for a Hub id of which only the headers were fetched."""
        return self.checkpoint.folder

    @property
    def model_type(self) -> str:
        """Of the config; empty if it has none."""
        return str(self.config.get("model_type") or "")

    @cached_property
    def fp4(self) -> dict[str, LinearEntries]:
        """Linears that are stored as codes."""
        return {module: linear for module, linear in self.linears.items() if linear.packed.dtype == "U8"}

    @cached_property
    def coded(self) -> dict[str, CodedLinear]:
        """Linears in FP8, MXFP4 or INT8."""
        return find_coded(self.checkpoint.tensors)

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Modules of the linears with a low-rank branch beside them (SVDQuant)."""
        return tuple(find_branches(self.checkpoint.tensors))

    @cached_property
    def engine_claim(self) -> QuantizationClaim | None:
        """The account of a quantization at the place where every engine looks."""
        return next((claim for claim in self.claims if claim.place == ENGINE_PLACE), None)

    @cached_property
    def claim(self) -> QuantizationClaim | None:
        """That account, or else the first elsewhere."""
        return self.engine_claim or (self.claims[0] if self.claims else None)

    @property
    def dialect(self) -> str:
        """Of the config's claim; empty if it claims nothing."""
        return self.claim.dialect if self.claim is not None else ""

    @property
    def is_mixed(self) -> bool:
        """Whether ModelOpt's config names the quantized layers one by one."""
        raw = self.claim.raw if self.claim is not None else {}
        inner = raw.get("quantization")
        layers = (inner if isinstance(inner, dict) else raw).get("quantized_layers")
        return isinstance(layers, dict) and bool(layers)

    @property
    def activations(self) -> str:
        """W4A16, W4A4, or wide."""
        if not self.fp4 or self.claim is None:
            return "wide"
        if self.is_mixed or self.dialect == "auto-round":
            return "W4A4" if any(linear.input_scale is not None for linear in self.fp4.values()) else "W4A16"
        return self.claim.activations.value

    @cached_property
    def statistics(self) -> tuple[str, ...]:
        """Names of tensors that calibration left."""
        return tuple(name for name in self.checkpoint.tensors if name.endswith(STATISTICS))

    @cached_property
    def kind(self) -> Kind:
        """See `Kind`."""
        if self.fp4:
            return Kind.NVFP4
        if self.claim is not None:
            is_fp4 = "FP4" in str(self.claim.raw).upper() or "NV_FP" in str(self.claim.raw).upper()
            return Kind.CLAIM_ONLY if is_fp4 else Kind.OTHER
        if self.folder is not None and (self.folder / FAKE_STATE).exists():
            return Kind.FAKE_QUANT
        if self.statistics or self.linears:
            return Kind.AMAX_ONLY
        return Kind.FAKE_QUANT if self._says_fake() else Kind.WIDE

    def _says_fake(self) -> bool:
        if self.folder is None or not (path := self.folder / "omnifp4.json").is_file():
            return False
        return '"output_format": "fake-quant"' in path.read_text(errors="replace")

    @cached_property
    def parts(self) -> dict[str, int]:
        """Tensor bytes by part; what no loader keeps is not counted."""
        sizes = {TEXT: 0, TOWERS: 0, SPEECH: 0}
        statistics = set(self.statistics)
        for name, entry in self.checkpoint.tensors.items():
            if name not in statistics:
                sizes[part_of(name)] += entry.nbytes
        return {part: size for part, size in sizes.items() if size}

    @cached_property
    def has_memory_names(self) -> bool:
        """Whether tensors have the names of Transformers 5.21 and later in memory, and are complete under them.

        Exporters that know no way back write them; Transformers reads them, other engines do not.
        """
        names = [name.replace(".weight_packed", ".weight") for name in self.checkpoint.tensors]
        renamed = [_released_name(name) for name in names]
        if renamed == names or not self.model_type.startswith(("qwen3_omni", "qwen2_5_omni")):
            return False
        try:
            return not layout_for(self.config, renamed).missing(renamed)
        except ModelError:
            return False

    @property
    def is_omni(self) -> bool:
        """Whether it is a model that may speak."""
        return self.model_type in ("qwen3_omni_moe", "qwen2_5_omni")

    @property
    def speaks(self) -> bool:
        """Whether it has weights for speech."""
        return SPEECH in self.parts

    @property
    def speech_is_random(self) -> bool:
        """Whether a loader would make a talker of random weights."""
        return self.is_omni and self.config.get("enable_audio_output", True) is True and not self.speaks

    @cached_property
    def has_experts(self) -> bool:
        """Whether FP4 experts are among the weights."""
        return any(".experts." in module for module in self.fp4)

    @cached_property
    def fp4_share(self) -> float:
        """FP4 parameters over all parameters."""
        codes = 2 * sum(linear.packed.parameters for linear in self.fp4.values())
        stored = {
            entry.name
            for linear in self.fp4.values()
            for entry in (linear.packed, linear.block_scale, linear.tensor_scale, linear.input_scale)
            if entry is not None
        }
        wide = sum(entry.parameters for name, entry in self.checkpoint.tensors.items() if name not in stored)
        return codes / max(1, codes + wide)


def _released_name(name: str) -> str:
    head, found, rest = name.partition("model.language_model.")
    if found:
        return f"{head}model.{rest}"
    return re.sub(r"(^|\.)model\.(audio_tower|visual)\.", r"\1\2.", name)


def part_of(name: str) -> str:
    """The part that a tensor belongs to."""
    if name.startswith(_SPEECH_PREFIXES):
        return SPEECH
    return TOWERS if name.startswith(_TOWER_PREFIXES) else TEXT


def facts_of(checkpoint: Checkpoint) -> Facts:
    """Read what the checkpoint says of itself."""
    claims = tuple(find_claims(checkpoint.config, checkpoint.folder))
    return Facts(checkpoint, claims, find_linears(checkpoint.tensors))


def read_facts(model: str, revision: str | None = None) -> Facts:
    """Of a local folder, or of a Hub id by its headers alone.

    Raises:
        CheckpointError: it cannot be read.
    """
    if Path(model).expanduser().is_dir():
        return facts_of(open_checkpoint(Path(model).expanduser()))
    from omnifp4.checkpoint.hub import fetch_headers, is_hub_id

    is_hub_id(model)
    return facts_of(fetch_headers(model, revision))
