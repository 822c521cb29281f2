"""Units of work that write one linear, or one group of linears, anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dialects import Activations, Dialect, LinearEntries
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.conversion.blocks import mend_block_scales, rescale, swap_nibbles
from omnifp4.conversion.inspection import LinearState, read_row_chunks, read_rows, read_scalar
from omnifp4.conversion.writing import Tools
from omnifp4.errors import CheckpointError
from omnifp4.formats import fast_cpu
from omnifp4.formats.nvfp4 import BLOCK_SIZE, ScaleRule
from omnifp4.formats.reference import tensor_scale_for
from omnifp4.models.source import SourceTensor

SOURCE_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class MendUnit:
    """A linear mended from its own codes and scales.

    Attributes:
        state: what its files hold.
        made_for: tensor scale, as stored, that its codes were made for.
        target_scale: tensor scale that it gets, as stored.
        swap: the two codes of each byte change places.
    """

    state: LinearState
    made_for: np.float32
    target_scale: np.float32
    swap: bool

    @property
    def name(self) -> str:
        return f"mend:{self.state.module}"

    @property
    def nbytes(self) -> int:
        linear = self.state.linear
        return linear.packed.nbytes + (linear.block_scale.nbytes if linear.block_scale else 0)

    def run(self, tools: Tools) -> dict[str, Any]:
        """Write codes and block scales; ``errors`` has squared error and energy if they were rounded."""
        state, linear = self.state, self.state.linear
        assert linear.block_scale is not None
        packed_name, scale_name = linear.packed.name, linear.block_scale.name
        packed_crc = scale_crc = 0
        error = energy = 0.0
        for begin, packed in read_row_chunks(tools.reader, linear.packed):
            scales = read_rows(tools.reader, linear.block_scale, begin, begin + len(packed))
            if self.swap:
                packed = swap_nibbles(packed)
            if state.counts.damaged:
                packed, scales = mend_block_scales(packed, scales)
            if self.made_for != self.target_scale:
                packed, scales, more_error, more_energy = rescale(
                    packed, scales, self.made_for, self.target_scale, reciprocal=linear.reciprocal
                )
                error, energy = error + more_error, energy + more_energy
            packed_crc = tools.writer.write(packed_name, packed, begin * packed.shape[1], packed_crc)
            scale_crc = tools.writer.write(scale_name, scales, begin * scales.shape[1], scale_crc)
        errors = {state.module: [error, energy]} if energy else {}
        return {"crc": {packed_name: packed_crc, scale_name: scale_crc}, "errors": errors}


@dataclass(frozen=True)
class EncodeUnit:
    """Linears that share a tensor scale, encoded from the original.

    Attributes:
        tensors: the wide weights.
        dialect: of the result.
        own: the wide weights are the artifact's own, not the original's.
    """

    tensors: tuple[SourceTensor, ...]
    dialect: Dialect
    own: bool

    @property
    def name(self) -> str:
        return f"encode:{self.tensors[0].spec.module}"

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def run(self, tools: Tools) -> dict[str, Any]:
        """Write codes, block scales and tensor scale; ``errors`` has squared error and energy of each linear."""
        source = tools.reader if self.own else tools.source
        assert source is not None
        where = source.checkpoint.location
        amax = 0.0
        for tensor in self.tensors:
            for _, rows in source_rows(source, tensor):
                found = fast_cpu.scan(rows, tensor.entry.dtype)
                if found.nonfinite_index >= 0:
                    raise CheckpointError(f"{where}: tensor {tensor.spec.name!r} has NaN or infinite values")
                amax = max(amax, found.amax)
        try:
            tensor_scale = tensor_scale_for(amax, ScaleRule.SWEEP)
        except ValueError as error:
            raise CheckpointError(f"{where}: tensor {self.tensors[0].spec.name!r}: {error}") from None
        record: dict[str, Any] = {"crc": {}, "errors": {}}
        for tensor in self.tensors:
            self._encode(tools, source, tensor, tensor_scale, record)
        return record

    def _encode(
        self, tools: Tools, source: CheckpointReader, tensor: SourceTensor, scale: np.float32, record: dict[str, Any]
    ) -> None:
        module, dialect = tensor.spec.module, self.dialect
        names = [stored.name for stored in dialect.stored(module, shape_of(tensor), Activations.WIDE)]
        packed_crc = scale_crc = 0
        error = energy = 0.0
        for begin, rows in source_rows(source, tensor):
            packed, block_scale, stats = encode_rows(rows, tensor.entry.dtype, scale)
            packed_crc = tools.writer.write(names[0], packed, begin * packed.shape[1], packed_crc)
            scale_crc = tools.writer.write(names[1], block_scale, begin * block_scale.shape[1], scale_crc)
            error, energy = error + stats.squared_error, energy + stats.energy
        stored = np.float32(1.0) / scale if dialect.reciprocal else scale
        record["crc"] |= {
            names[0]: packed_crc,
            names[1]: scale_crc,
            names[2]: tools.writer.write(names[2], np.array([stored], dtype="<f4")),
        }
        record["errors"][module] = [error, energy]


@dataclass(frozen=True)
class DecodeUnit:
    """A linear that is stored wide again, as BF16."""

    linear: LinearEntries

    @property
    def target(self) -> str:
        """Name of the wide weight."""
        return f"{self.linear.module}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.linear.packed.shape[0], self.linear.packed.shape[1] * 2

    @property
    def name(self) -> str:
        return f"decode:{self.linear.module}"

    @property
    def nbytes(self) -> int:
        return self.linear.packed.nbytes

    def run(self, tools: Tools) -> dict[str, Any]:
        """Write the weights."""
        linear, crc = self.linear, 0
        scale = read_scalar(tools.reader, linear.tensor_scale)
        assert linear.block_scale is not None and scale is not None
        for begin, packed in read_row_chunks(tools.reader, linear.packed):
            scales = read_rows(tools.reader, linear.block_scale, begin, begin + len(packed))
            values = np.empty((packed.shape[0], self.shape[1]), dtype=np.uint16)
            factors = fast_cpu.effective_scale(scales, scale, reciprocal=linear.reciprocal)
            fast_cpu.decode_into(packed, factors, values)
            crc = tools.writer.write(self.target, values, begin * self.shape[1] * 2, crc)
        return {"crc": {self.target: crc}}


@dataclass(frozen=True)
class FetchUnit:
    """A wide tensor of the original that stands inside a fused one there, under the name it gets."""

    target: str
    tensor: SourceTensor

    @property
    def name(self) -> str:
        return f"fetch:{self.target}"

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def run(self, tools: Tools) -> dict[str, Any]:
        """Write it."""
        assert tools.source is not None
        return {"crc": {self.target: tools.writer.write(self.target, self.tensor.read(tools.source))}}


def encode_rows(
    rows: npt.NDArray[np.generic], dtype: str, scale: np.float32
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], fast_cpu.EncodeStats]:
    """Codes, block scales and error of some rows under a tensor scale, by the sweep."""
    packed = np.empty((rows.shape[0], rows.shape[1] // 2), dtype=np.uint8)
    block_scale = np.empty((rows.shape[0], rows.shape[1] // BLOCK_SIZE), dtype=np.uint8)
    stats = fast_cpu.encode_into(rows, dtype, ScaleRule.SWEEP, scale, packed, block_scale)
    return packed, block_scale, stats


def source_rows(reader: CheckpointReader, tensor: SourceTensor) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
    """First row and values of each range of rows of a wide linear."""
    if not tensor.rows_divide:
        yield 0, tensor.read(reader)
        return
    rows = tensor.spec.shape[0]
    row_bytes = tensor.nbytes // rows
    step = max(1, SOURCE_CHUNK_BYTES // row_bytes)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield begin, tensor.read_rows(reader, begin, end, np.empty((end - begin) * row_bytes, dtype=np.uint8))


def shape_of(tensor: SourceTensor) -> tuple[int, int]:
    """``(out, in)`` of a linear."""
    return tensor.spec.shape[0], tensor.spec.shape[1]
