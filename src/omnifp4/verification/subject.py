"""The artifact under proof: its files' own account, joined to what its config says should be there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.artifact import ENGINE_PLACE, find_claims, find_linears
from omnifp4.checkpoint.dialects import (
    COMPRESSED_TENSORS,
    MODELOPT,
    Activations,
    Dialect,
    LinearEntries,
    QuantizationClaim,
)
from omnifp4.checkpoint.folder import Checkpoint, open_checkpoint, read_json
from omnifp4.errors import CheckpointError
from omnifp4.models import Kind, Layout, Part, TensorSpec, layout_for

RECEIPT_NAME: Final = "omnifp4.json"
FAKE_QUANT: Final = "fake-quant"

READABLE_KINDS: Final = frozenset({Kind.ATTENTION, Kind.EXPERTS, Kind.SHARED_EXPERTS, Kind.MLP})
"""What engines build with a quantization config, in thinker and talker. Heads, routers, towers and vocoder are not."""

SPEECH_PREFIXES: Final = ("talker.", "code2wav.", "token2wav.")


@dataclass(frozen=True)
class Subject:
    """An artifact, read but not judged.

    Attributes:
        checkpoint: config and headers.
        layout: what the config calls for.
        claims: every account of a quantization.
        linears: every linear that has codes or NVFP4 scales, by module.
        receipt: the content of omnifp4.json, None where there is none; written by us, but read without trust.
    """

    checkpoint: Checkpoint
    layout: Layout
    claims: tuple[QuantizationClaim, ...]
    linears: Mapping[str, LinearEntries]
    receipt: Mapping[str, Any] | None

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return Path(self.checkpoint.location)

    @cached_property
    def claim(self) -> QuantizationClaim | None:
        """The account that counts: the one where engines look, or else the first of the others."""
        return self.claims[0] if self.claims else None

    @cached_property
    def fp4(self) -> dict[str, LinearEntries]:
        """The linears whose codes are bytes: the only ones that shrank."""
        return {module: linear for module, linear in self.linears.items() if linear.packed.dtype == "U8"}

    @cached_property
    def dialect(self) -> Dialect | None:
        """The dialect of the tensors; None where nothing is quantized."""
        divisors = sum(linear.reciprocal for linear in self.fp4.values())
        if not self.fp4:
            return None
        return COMPRESSED_TENSORS if 2 * divisors > len(self.fp4) else MODELOPT

    @cached_property
    def activations(self) -> Activations:
        """As the config says, or else as the tensors have it."""
        if self.claim is not None and not self.mixed_layers and self.claim.dialect != "auto-round":
            return self.claim.activations
        has_inputs = any(linear.input_scale is not None for linear in self.fp4.values())
        return Activations.FP4 if has_inputs else Activations.WIDE

    @cached_property
    def linear_specs(self) -> dict[str, TensorSpec]:
        """The layout's linears by module."""
        return {spec.module: spec for spec in self.layout.tensors if spec.is_linear}

    @cached_property
    def mixed_layers(self) -> dict[str, str]:
        """Algorithm by layer name, where the config is of mixed precision; empty otherwise."""
        raw = self.claim.raw if self.claim is not None else {}
        inner = raw.get("quantization")
        layers = (inner if isinstance(inner, dict) else raw).get("quantized_layers")
        if not isinstance(layers, dict):
            return {}
        return {
            name: str(info.get("quant_algo", "")).upper() for name, info in layers.items() if isinstance(info, dict)
        }

    @cached_property
    def is_fake_quant(self) -> bool:
        """Its receipt says that it is a wide checkpoint rounded through NVFP4."""
        return self.receipt is not None and self.receipt.get("output_format", self.receipt.get("format")) == FAKE_QUANT

    @cached_property
    def asked_components(self) -> frozenset[str]:
        """Names of the components that our own recipe made FP4, as the receipt tells."""
        rows = (self.receipt or {}).get("components")
        found = (row for row in rows if isinstance(row, dict)) if isinstance(rows, list) else ()
        return frozenset(str(row.get("name")) for row in found if row.get("scheme") == "nvfp4")

    @cached_property
    def wide_equivalent_bytes(self) -> int:
        """Bytes of the shard files if the FP4 linears were BF16."""
        quantized = {
            entry.name
            for linear in self.fp4.values()
            for entry in (linear.packed, linear.block_scale, linear.tensor_scale, linear.input_scale)
            if entry is not None
        }
        wide = sum(entry.nbytes for name, entry in self.checkpoint.tensors.items() if name not in quantized)
        headers = self.checkpoint.weight_bytes - sum(entry.nbytes for entry in self.checkpoint.tensors.values())
        return headers + wide + 2 * self.fp4_parameters

    @property
    def compression_ratio(self) -> float:
        """How many times smaller the shard files are."""
        return self.wide_equivalent_bytes / max(1, self.checkpoint.weight_bytes)

    @cached_property
    def fp4_parameters(self) -> int:
        """Weights that are stored as codes."""
        return sum(2 * linear.packed.parameters for linear in self.fp4.values())


def is_readable(spec: TensorSpec) -> bool:
    """Whether engines read this linear as FP4."""
    component = spec.component
    return component.kind in READABLE_KINDS and component.part in (Part.THINKER, Part.TALKER)


def read_subject(folder: Path) -> Subject:
    """Read config and headers.

    Raises:
        CheckpointError: the folder is not readable as a checkpoint.
        ModelError: the model type is unknown, or its config unusable.
    """
    checkpoint = open_checkpoint(folder)
    layout = layout_for(checkpoint.config, checkpoint.tensors)
    receipt = None
    path = folder / RECEIPT_NAME
    if path.is_file():
        receipt = read_json(path)
        if not isinstance(receipt, dict):
            raise CheckpointError(f"{path}: the receipt is no JSON object")
    claims = tuple(find_claims(checkpoint.config, folder))
    return Subject(checkpoint, layout, claims, find_linears(checkpoint.tensors), receipt)


def engine_claim(subject: Subject) -> QuantizationClaim | None:
    """The claim at the place where every engine looks."""
    return next((claim for claim in subject.claims if claim.place == ENGINE_PLACE), None)
