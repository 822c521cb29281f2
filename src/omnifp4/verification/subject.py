"""The artifact under proof: its files' own account, joined to what its config says should be there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.artifact import ENGINE_PLACE, find_claims, find_coded, find_linears
from omnifp4.checkpoint.dialects import (
    COMPRESSED_TENSORS,
    MODELOPT,
    Activations,
    CodedLinear,
    Dialect,
    LinearEntries,
    QuantizationClaim,
)
from omnifp4.checkpoint.folder import Checkpoint, open_checkpoint, read_json
from omnifp4.checkpoint.folds import Folds, read_folds
from omnifp4.errors import CheckpointError
from omnifp4.formats.scheme import Scheme
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
        linears: every linear that has NVFP4 codes or scales, by module.
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
    def coded(self) -> dict[str, CodedLinear]:
        """The linears in FP8, MXFP4 and INT8, by module."""
        return find_coded(self.checkpoint.tensors)

    @cached_property
    def quantized(self) -> dict[str, Scheme]:
        """The scheme of every linear that is not stored wide, by module."""
        return {
            **dict.fromkeys(self.fp4, Scheme.NVFP4),
            **{module: linear.scheme for module, linear in self.coded.items()},
        }

    def scheme_of(self, module: str) -> Scheme:
        """What the tensors of a linear are."""
        return self.quantized.get(module, Scheme.WIDE)

    @cached_property
    def dialect(self) -> Dialect | None:
        """The dialect of the tensors; None where nothing is quantized, or both write it so."""
        divisors = sum(linear.reciprocal for linear in self.fp4.values())
        if not self.fp4:
            return _dialect_of(self.coded)
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
    def folds(self) -> Folds:
        """Factors that our own recipes folded away."""
        return read_folds(self.folder)

    @cached_property
    def method(self) -> str:
        """How a calibrated recipe of ours rounded, as the receipt tells; empty otherwise."""
        use = (self.receipt or {}).get("calibration")
        method = use.get("method") if isinstance(use, dict) else None
        return str(method.get("name", "")) if isinstance(method, dict) else ""

    @cached_property
    def is_fake_quant(self) -> bool:
        """Its receipt says that it is a wide checkpoint rounded through NVFP4."""
        return self.receipt is not None and self.receipt.get("output_format", self.receipt.get("format")) == FAKE_QUANT

    @cached_property
    def asked_components(self) -> frozenset[str]:
        """Names of the components that our own recipe quantized, as the receipt tells."""
        rows = (self.receipt or {}).get("components")
        found = (row for row in rows if isinstance(row, dict)) if isinstance(rows, list) else ()
        return frozenset(str(row.get("name")) for row in found if row.get("scheme") != Scheme.WIDE.value)

    @cached_property
    def wide_equivalent_bytes(self) -> int:
        """Bytes of the shard files if the quantized linears were BF16."""
        quantized = {
            entry.name
            for linear in self.fp4.values()
            for entry in (linear.packed, linear.block_scale, linear.tensor_scale, linear.input_scale)
            if entry is not None
        }
        quantized.update(entry.name for linear in self.coded.values() for entry in linear.entries)
        wide = sum(entry.nbytes for name, entry in self.checkpoint.tensors.items() if name not in quantized)
        headers = self.checkpoint.weight_bytes - sum(entry.nbytes for entry in self.checkpoint.tensors.values())
        return headers + wide + 2 * self.quantized_parameters

    @property
    def compression_ratio(self) -> float:
        """How many times smaller the shard files are."""
        return self.wide_equivalent_bytes / max(1, self.checkpoint.weight_bytes)

    @cached_property
    def fp4_parameters(self) -> int:
        """Weights that are stored as four-bit codes."""
        nvfp4 = sum(2 * linear.packed.parameters for linear in self.fp4.values())
        return nvfp4 + sum(_parameters(linear) for linear in self.coded.values() if linear.scheme.code_bits == 4)

    @cached_property
    def quantized_parameters(self) -> int:
        """Weights that are stored as codes of any kind."""
        nvfp4 = sum(2 * linear.packed.parameters for linear in self.fp4.values())
        return nvfp4 + sum(_parameters(linear) for linear in self.coded.values())

    @cached_property
    def linears_by_scheme(self) -> dict[str, int]:
        """How many linears each scheme has."""
        return {scheme.value: count for scheme, count in Counter(self.quantized.values()).items()}


def _parameters(linear: CodedLinear) -> int:
    rows, columns = linear.shape
    return rows * columns


def _dialect_of(coded: Mapping[str, CodedLinear]) -> Dialect | None:
    """The dialect that writes these names and shapes, if only one does."""
    for linear in coded.values():
        if linear.codes.name.endswith(".weight_packed"):
            return COMPRESSED_TENSORS
        if linear.scheme is Scheme.MXFP4:
            return MODELOPT
        if linear.scale is not None and linear.scale.parameters > 1:
            return COMPRESSED_TENSORS if len(linear.scale.shape) == 2 else MODELOPT
    return None


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
