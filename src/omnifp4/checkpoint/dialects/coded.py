"""How linears in FP8, MXFP4 and INT8 stand on disk: for each dialect and scheme a form, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dtypes import byte_count
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.formats.scheme import Scheme

VALUES_PER_ELEMENT: Final = {"F8_E4M3": 1, "I8": 1, "U8": 2, "I32": 4}
"""Weights in one element of the codes, by its dtype."""

OFFSET_BIT: Final = np.uint8(0x80)
"""Integers packed into I32 are stored with 128 added, so that they are never negative."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor to be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CodedForm:
    """The tensors that hold a linear of one scheme in one dialect.

    Attributes:
        codes_suffix, scale_suffix: ends of their names.
        codes_dtype, scale_dtype: as safetensors calls them.
        scale_is_column: a scale for each channel has shape ``[out, 1]`` instead of ``[out]``.
        shape_suffix: end of the name of an I64 ``[2]`` tensor that holds ``out`` and ``in``; empty: there is none.
    """

    codes_suffix: str
    codes_dtype: str
    scale_suffix: str
    scale_dtype: str
    scale_is_column: bool = False
    shape_suffix: str = ""

    def stored(self, module: str, shape: tuple[int, int]) -> tuple[StoredTensor, ...]:
        """The tensors for a linear of shape ``(out, in)``: codes, scale, and the shape where there is one."""
        rows, columns = shape
        if self.scale_dtype == "U8":
            scale_shape: tuple[int, ...] = (rows, columns // Scheme.MXFP4.block_size)
        else:
            scale_shape = (rows, 1) if self.scale_is_column else (rows,)
        tensors = [
            StoredTensor(
                module + self.codes_suffix, self.codes_dtype, (rows, columns // VALUES_PER_ELEMENT[self.codes_dtype])
            ),
            StoredTensor(module + self.scale_suffix, self.scale_dtype, scale_shape),
        ]
        if self.shape_suffix:
            tensors.append(StoredTensor(module + self.shape_suffix, "I64", (2,)))
        return tuple(tensors)

    def codes_on_disk(self, codes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Bytes ``[rows, n]`` to be written for codes as `formats.coded` has them."""
        raw = np.ascontiguousarray(codes).view(np.uint8)
        return raw ^ OFFSET_BIT if self.codes_dtype == "I32" else raw

    def scale_on_disk(self, scale: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Scales as they are written, BF16 as its bits. A scale that is to be BF16 has to be a BF16 number."""
        if self.scale_dtype == "BF16":
            return (scale.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return scale


@dataclass(frozen=True, slots=True)
class CodedLinear:
    """The tensors of one FP8, MXFP4 or INT8 linear as they stand on disk.

    Attributes:
        module: checkpoint name without the tensor's own last part.
        scheme: what its codes are.
        codes: F8_E4M3 or I8 ``[out, in]``, U8 ``[out, in / 2]``, or I32 ``[out, in / 4]``.
        scale: F32, BF16 or F16 of one value, ``[out]`` or ``[out, 1]``; U8 ``[out, in / 32]``; None where it is missing.
        input_scale: of static 8-bit activations, which are not used here; None where there is none.
        shape_note: the I64 tensor that tells the shape; None where there is none.
    """

    module: str
    scheme: Scheme
    codes: TensorEntry
    scale: TensorEntry | None
    input_scale: TensorEntry | None = None
    shape_note: TensorEntry | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``, as the codes have it; zeros where they are no matrix."""
        if len(self.codes.shape) != 2:
            return 0, 0
        rows, columns = self.codes.shape
        return rows, columns * VALUES_PER_ELEMENT[self.codes.dtype]

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All of its tensors that are there."""
        parts = (self.codes, self.scale, self.input_scale, self.shape_note)
        return tuple(part for part in parts if part is not None)

    def problems(self) -> list[str]:
        """What is wrong with the types and shapes of its tensors, one line each."""
        rows, columns = self.shape
        if not rows or columns % self.scheme.width_multiple:
            return [
                f"{self.codes.name}: {self.scheme} codes of shape {list(self.codes.shape)}; a matrix of width a multiple of "
                f"{self.scheme.width_multiple} is needed"
            ]
        if self.scale is None:
            return [f"{self.module}: its scale is missing, without which {self.codes.name} means nothing"]
        wanted: tuple[str, ...] = ("F32", "BF16", "F16")
        allowed: tuple[tuple[int, ...], ...] = ((), (1,), (rows,), (rows, 1))
        if self.scheme is Scheme.MXFP4:
            wanted, allowed = ("U8",), ((rows, columns // Scheme.MXFP4.block_size),)
        if self.scale.dtype not in wanted or self.scale.shape not in allowed:
            shapes = " or ".join(str(list(shape)) for shape in allowed)
            return [
                f"{self.scale.name}: {self.scale.dtype} {list(self.scale.shape)} where {' or '.join(wanted)} {shapes} is "
                "needed"
            ]
        if self.shape_note is not None and (self.shape_note.dtype[0] != "I" or self.shape_note.shape != (2,)):
            return [
                f"{self.shape_note.name}: {self.shape_note.dtype} {list(self.shape_note.shape)} where I64 [2] is needed"
            ]
        return []

    @property
    def code_bytes(self) -> int:
        """Bytes of one row of codes."""
        return byte_count(self.codes.dtype, self.codes.shape[1:])


def codes_from_disk(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[Any]:
    """Codes as `formats.coded` has them, of rows of bytes ``[rows, n]``; inverse of `CodedForm.codes_on_disk`."""
    if dtype == "I32":
        return (raw ^ OFFSET_BIT).view(np.int8)
    return raw.view(np.int8) if dtype == "I8" else raw


def scale_from_disk(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Scales as `formats.coded` has them: E8M0 bits, or float32 ``[out]`` or ``[1]``."""
    if dtype == "U8":
        return stored
    flat = stored.reshape(-1)
    if dtype == "BF16":
        return (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return flat.astype(np.float32)


def find_coded(
    tensors: Mapping[str, TensorEntry], nvfp4_marks: tuple[str, ...], input_suffixes: tuple[str, ...]
) -> dict[str, CodedLinear]:
    """The FP8, MXFP4 and INT8 linears among a checkpoint's tensors, by module, told by their types.

    FP8 with scales for squares of the matrix is none of them.

    Args:
        tensors: of the checkpoint.
        nvfp4_marks: ends of names of tensor scales: a linear that has one is NVFP4, whatever else it has.
        input_suffixes: ends of names of input scales.
    """
    found: dict[str, CodedLinear] = {}
    for name, codes in tensors.items():
        module, dot, leaf = name.rpartition(".")
        if not dot or leaf not in ("weight", "weight_packed"):
            continue
        scale = tensors.get(f"{module}.weight_scale")
        scheme = _scheme_of(leaf, codes, scale)
        if scheme is Scheme.FP8 and (f"{module}.weight_scale_inv" in tensors or _has_block_scales(scale)):
            continue
        if scheme is None or (codes.dtype == "U8" and any(module + mark in tensors for mark in nvfp4_marks)):
            continue
        inputs = (tensors.get(module + suffix) for suffix in input_suffixes)
        note = tensors.get(f"{module}.weight_shape") if codes.dtype == "I32" else None
        found.setdefault(
            module, CodedLinear(module, scheme, codes, scale, next((i for i in inputs if i is not None), None), note)
        )
    return found


def _has_block_scales(scale: TensorEntry | None) -> bool:
    """FP8 with a scale for each square of the matrix, which is another format than the one here."""
    return scale is not None and len(scale.shape) > 1 and max(scale.shape[1:]) > 1


def _scheme_of(leaf: str, codes: TensorEntry, scale: TensorEntry | None) -> Scheme | None:
    if leaf == "weight" and codes.dtype == "F8_E4M3":
        return Scheme.FP8
    if (leaf, codes.dtype) in {("weight", "I8"), ("weight_packed", "I32")}:
        return Scheme.INT8
    if codes.dtype == "U8" and scale is not None and scale.dtype == "U8":
        return Scheme.MXFP4
    return None
