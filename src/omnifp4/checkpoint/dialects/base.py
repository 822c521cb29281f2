"""What a dialect is: how quantized linears and the config that announces them look on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from omnifp4.checkpoint.branch import BranchEntries
from omnifp4.checkpoint.dialects.coded import CodedForm, StoredTensor
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.formats.scheme import Scheme


class Activations(StrEnum):
    """What happens to a linear's input."""

    WIDE = "W4A16"
    """It stays as it is."""
    FP4 = "W4A4"
    """It is rounded to NVFP4 on the way in; the checkpoint gives one input scale for it."""


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
        branch: a low-rank part that is computed beside it; None where there is none.
    """

    module: str
    packed: TensorEntry
    block_scale: TensorEntry | None
    tensor_scale: TensorEntry | None
    input_scale: TensorEntry | None
    reciprocal: bool
    branch: BranchEntries | None = None


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
    """A way to write quantized linears to disk.

    Attributes:
        coded_forms: for each scheme beside NVFP4 that it can express, how.
    """

    name: str
    packed_suffix: str
    block_scale_suffix: str
    tensor_scale_suffix: str
    input_scale_suffix: str
    reciprocal: bool
    coded_forms: Mapping[Scheme, CodedForm]

    def stored(
        self, module: str, shape: tuple[int, int], activations: Activations, scheme: Scheme = Scheme.NVFP4
    ) -> tuple[StoredTensor, ...]:
        """The tensors that hold a linear of shape ``(out, in)``, largest first: codes, block scale, tensor scale …

        Raises:
            RecipeError: the dialect has no form for `scheme`.
        """
        ...

    def quantization_config(
        self,
        activations: Activations,
        ignore: Sequence[str],
        producer: Mapping[str, str],
        schemes: Mapping[str, Scheme] | None = None,
    ) -> dict[str, Any]:
        """The object for config.json's top-level ``quantization_config``.

        Args:
            activations: of the NVFP4 linears.
            ignore: from `ignore_entries`.
            producer: name and version of the tool.
            schemes: of every quantized linear, by module; None: all are NVFP4.
        """
        ...

    def ignore_entries(self, wide: Iterable[str], quantized: Iterable[str]) -> list[str]:
        """Entries that name every module of `wide` and none of `quantized`, in this dialect's matching rules."""
        ...

    def is_ignored(self, module: str, entries: Sequence[str]) -> bool:
        """Whether an engine reading this dialect takes `module` for one that is not quantized."""
        ...
