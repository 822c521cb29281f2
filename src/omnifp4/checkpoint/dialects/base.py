"""What a dialect is: how NVFP4 linears and the config that announces them look on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from omnifp4.checkpoint.header import TensorEntry


class Activations(StrEnum):
    """What happens to a linear's input."""

    WIDE = "W4A16"
    """It stays as it is."""
    FP4 = "W4A4"
    """It is rounded to NVFP4 on the way in; the checkpoint gives one input scale for it."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor to be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinearEntries:
    """The tensors of one NVFP4 linear as they stand on disk.

    Attributes:
        module: checkpoint name without the tensor's own last part.
        packed: codes, U8 ``[out, in / 2]``.
        block_scale: F8_E4M3 ``[out, in / 16]``.
        tensor_scale: F32, one value.
        input_scale: F32, one value; None in W4A16.
        reciprocal: the stored tensor scale and input scale are divisors, not factors.
    """

    module: str
    packed: TensorEntry
    block_scale: TensorEntry | None
    tensor_scale: TensorEntry | None
    input_scale: TensorEntry | None
    reciprocal: bool


@dataclass(frozen=True)
class QuantizationClaim:
    """What a checkpoint's config says of its quantization.

    Attributes:
        dialect: name of the dialect whose form the config has.
        activations: W4A16 or W4A4.
        group_size: values per block scale.
        ignore: entries as written.
        place: where it was found, such as ``config.json: quantization_config``.
        raw: the object as it stands.
    """

    dialect: str
    activations: Activations
    group_size: int
    ignore: tuple[str, ...]
    place: str
    raw: Mapping[str, Any]


class Dialect(Protocol):
    """A way to write NVFP4 linears to disk."""

    name: str
    packed_suffix: str
    block_scale_suffix: str
    tensor_scale_suffix: str
    input_scale_suffix: str
    reciprocal: bool

    def stored(self, module: str, shape: tuple[int, int], activations: Activations) -> tuple[StoredTensor, ...]:
        """The tensors that hold a linear of shape ``(out, in)``, largest first: codes, block scale, tensor scale …"""
        ...

    def quantization_config(
        self, activations: Activations, ignore: Sequence[str], producer: Mapping[str, str]
    ) -> dict[str, Any]:
        """The object for config.json's top-level ``quantization_config``."""
        ...

    def ignore_entries(self, wide: Iterable[str], quantized: Iterable[str]) -> list[str]:
        """Entries that name every module of `wide` and none of `quantized`, in this dialect's matching rules."""
        ...

    def is_ignored(self, module: str, entries: Sequence[str]) -> bool:
        """Whether an engine reading this dialect takes `module` for one that is not quantized."""
        ...
