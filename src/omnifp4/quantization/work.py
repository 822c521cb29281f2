"""One unit of work: read, encode or copy, write, and tell what was written."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dtypes import NUMPY_DTYPES, WIDE_FLOATS
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.output import OutputWriter
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.formats import coded, fast_cpu
from omnifp4.formats.nvfp4 import BLOCK_SIZE, EncodeStats, Float32Array, ScaleRule
from omnifp4.formats.reference import tensor_scale_for
from omnifp4.formats.scheme import Scheme
from omnifp4.formats.widening import narrow, widen
from omnifp4.models.source import SourceTensor
from omnifp4.quantization.decisions import CopyUnit, EncodeUnit, FusedUnit, OutputFormat, Unit

HOLD_BYTES: Final = 32 << 20
"""A unit up to this size is read once; a larger one is read twice, in ranges of rows, so that memory stays bounded."""

CHUNK_BYTES: Final = 16 << 20


class Worker:
    """Does units of work for one job; one instance serves all threads."""

    def __init__(
        self, reader: CheckpointReader, writer: OutputWriter, rule: ScaleRule, output_format: OutputFormat
    ) -> None:
        self._reader, self._writer = reader, writer
        self._rule, self._format = rule, output_format
        self._local = threading.local()

    def run(self, unit: Unit) -> dict[str, Any]:
        """Do one unit.

        Returns:
            ``crc``: CRC-32 of each stored tensor; ``errors``: ``[squared error, energy]`` of each encoded weight.

        Raises:
            CheckpointError: the source cannot be read, or holds NaN, infinite or absurdly large weights.
            OSError: the output cannot be written.
        """
        if isinstance(unit, CopyUnit):
            return {"crc": {entry.name: self._copy(entry) for entry in unit.entries}, "errors": {}}
        return self._round_fused(unit) if isinstance(unit, FusedUnit) else self._encode(unit)

    def _buffer(self, size: int) -> npt.NDArray[np.uint8]:
        """A piece of memory of this thread, used again by its next unit (fresh pages cost as much as the arithmetic)."""
        buffer: npt.NDArray[np.uint8] | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.nbytes < size:
            buffer = self._local.buffer = np.empty(size, dtype=np.uint8)
        return buffer[:size]

    def _copy(self, entry: TensorEntry) -> int:
        crc, position = 0, 0
        while position < entry.nbytes:
            chunk = self._buffer(min(CHUNK_BYTES, entry.nbytes - position))
            self._reader.read_into(entry, chunk, position)
            self._check_finite(entry, chunk, position)
            crc = self._writer.write(entry.name, chunk, position, crc)
            position += chunk.nbytes
        return crc

    def _check_finite(self, entry: TensorEntry, chunk: npt.NDArray[np.uint8], position: int) -> None:
        if entry.dtype in WIDE_FLOATS:
            dtype = NUMPY_DTYPES[entry.dtype]
            index = fast_cpu.scan(chunk.view(dtype), entry.dtype).nonfinite_index
            if index >= 0:
                raise self._not_finite(entry.name, entry, position // dtype.itemsize + index)

    def _not_finite(self, name: str, entry: TensorEntry, index: int) -> CheckpointError:
        return CheckpointError(
            f"{self._reader.checkpoint.location}/{entry.shard}: tensor {name!r} has NaN or infinite values, the first at "
            f"element {index}",
            hint="the checkpoint is damaged: fetch it again",
        )

    def _encode(self, unit: EncodeUnit) -> dict[str, Any]:
        held: list[npt.NDArray[np.generic]] | None = None
        if all(tensor.rows_divide for tensor in unit.tensors):
            total = sum(tensor.nbytes for tensor in unit.tensors)
            if total <= HOLD_BYTES:
                held = self._hold(unit, total)
        else:
            held = [tensor.read(self._reader) for tensor in unit.tensors]
        tensor_scale = self._shared_scale(unit.tensors, held)
        record: dict[str, Any] = {"crc": {}, "errors": {}}
        for index, tensor in enumerate(unit.tensors):
            if unit.scheme is not Scheme.NVFP4:
                self._code_tensor(tensor, unit.scheme, held[index] if held else None, record)
                continue
            self._encode_tensor(tensor, tensor_scale, held[index] if held else None, record)
        return record

    def _round_fused(self, unit: FusedUnit) -> dict[str, Any]:
        """Experts one after another, each written whole: its linears side by side, turned as they were."""
        errors: dict[str, list[float]] = {}
        crc = position = 0
        for tensors in unit.experts:
            held = [tensor.read(self._reader) for tensor in tensors]
            tensor_scale = self._shared_scale(tensors, held)
            parts = []
            for tensor, rows in zip(tensors, held, strict=True):
                if unit.scheme is Scheme.NVFP4:
                    packed, block_scale, stats = self._encode_rows(rows, tensor.entry.dtype, tensor_scale)
                    parts.append(_rounded_values(packed, block_scale, tensor_scale, tensor.entry.dtype))
                else:
                    _, decoded, stats = self._code_rows(rows, tensor, unit.scheme)
                    parts.append(narrow(decoded, tensor.entry.dtype))
                errors[tensor.spec.name] = [stats.squared_error, stats.energy]
            expert = np.concatenate(parts)
            if not tensors[0].rows_divide:
                expert = np.ascontiguousarray(expert.T)
            crc = self._writer.write(unit.entry.name, expert, position, crc)
            position += expert.nbytes
        return {"crc": {unit.entry.name: crc}, "errors": errors}

    def _shared_scale(
        self, tensors: Sequence[SourceTensor], held: Sequence[npt.NDArray[np.generic]] | None
    ) -> np.float32:
        amax, largest = 0.0, tensors[0]
        for index, tensor in enumerate(tensors):
            for row, rows in self._row_ranges(tensor, held[index] if held else None):
                found = fast_cpu.scan(rows, tensor.entry.dtype)
                if found.nonfinite_index >= 0:
                    first = row * tensor.spec.shape[1] + found.nonfinite_index
                    raise self._not_finite(tensor.spec.name, tensor.entry, first)
                if found.amax > amax:
                    amax, largest = found.amax, tensor
        try:
            return tensor_scale_for(amax, self._rule)
        except ValueError as error:
            raise CheckpointError(
                f"{self._reader.checkpoint.location}/{largest.entry.shard}: tensor {largest.spec.name!r}: {error}"
            ) from None

    def _encode_rows(
        self, rows: npt.NDArray[np.generic], dtype: str, tensor_scale: np.float32
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], EncodeStats]:
        packed = np.empty((rows.shape[0], rows.shape[1] // 2), dtype=np.uint8)
        block_scale = np.empty((rows.shape[0], rows.shape[1] // BLOCK_SIZE), dtype=np.uint8)
        stats = fast_cpu.encode_into(rows, dtype, self._rule, tensor_scale, packed, block_scale)
        return packed, block_scale, stats

    def _code_rows(
        self, rows: npt.NDArray[np.generic], tensor: SourceTensor, scheme: Scheme
    ) -> tuple[coded.CodedTensor, Float32Array, EncodeStats]:
        wide = widen(rows, tensor.entry.dtype)
        done = coded.encode(wide, scheme, self._rule)
        decoded = coded.decode(done)
        return done, decoded, coded.error_of(wide, decoded)

    def _code_tensor(
        self, tensor: SourceTensor, scheme: Scheme, held: npt.NDArray[np.generic] | None, record: dict[str, Any]
    ) -> None:
        """One linear in a scheme whose scales depend on single rows."""
        dialect, module = self._format.dialect, tensor.spec.module
        form = dialect.coded_forms[scheme] if dialect else None
        codes_name = module + form.codes_suffix if form else tensor.spec.name
        codes_crc = scale_crc = codes_end = scale_end = 0
        squared_error = energy = 0.0
        ranges = (rows for _, rows in self._row_ranges(tensor, held))
        for part in (rows[chunk] for rows in ranges for chunk in coded.row_chunks(*rows.shape)):
            done, decoded, stats = self._code_rows(part, tensor, scheme)
            squared_error += stats.squared_error
            energy += stats.energy
            codes = form.codes_on_disk(done.codes) if form else narrow(decoded, tensor.entry.dtype)
            codes_crc = self._writer.write(codes_name, codes, codes_end, codes_crc)
            codes_end += codes.nbytes
            if form:
                scale = form.scale_on_disk(done.scale)
                scale_crc = self._writer.write(module + form.scale_suffix, scale, scale_end, scale_crc)
                scale_end += scale.nbytes
        record["crc"][codes_name] = codes_crc
        if form:
            record["crc"][module + form.scale_suffix] = scale_crc
            if form.shape_suffix:
                name = module + form.shape_suffix
                record["crc"][name] = self._writer.write(name, np.array(tensor.spec.shape, dtype="<i8"))
        record["errors"][tensor.spec.name] = [squared_error, energy]

    def _hold(self, unit: EncodeUnit, total: int) -> list[npt.NDArray[np.generic]]:
        buffer, held, position = self._buffer(total), [], 0
        for tensor in unit.tensors:
            part = buffer[position : position + tensor.nbytes]
            held.append(tensor.read_rows(self._reader, 0, tensor.spec.shape[0], part))
            position += tensor.nbytes
        return held

    def _row_ranges(
        self, tensor: SourceTensor, held: npt.NDArray[np.generic] | None
    ) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
        """First row and values of each range: the whole tensor where it is held, ranges that fit a chunk otherwise."""
        if held is not None:
            yield 0, held
            return
        rows = tensor.spec.shape[0]
        step = max(1, CHUNK_BYTES // (tensor.nbytes // rows))
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            buffer = self._buffer((end - begin) * (tensor.nbytes // rows))
            yield begin, tensor.read_rows(self._reader, begin, end, buffer)

    def _encode_tensor(
        self,
        tensor: SourceTensor,
        tensor_scale: np.float32,
        held: npt.NDArray[np.generic] | None,
        record: dict[str, Any],
    ) -> None:
        columns, dtype = tensor.spec.shape[1], tensor.entry.dtype
        dialect = self._format.dialect
        packed_crc = scale_crc = 0
        squared_error = energy = 0.0
        for begin, rows in self._row_ranges(tensor, held):
            packed, block_scale, stats = self._encode_rows(rows, dtype, tensor_scale)
            squared_error += stats.squared_error
            energy += stats.energy
            if dialect is None:
                wide = _rounded_values(packed, block_scale, tensor_scale, dtype)
                packed_crc = self._writer.write(
                    tensor.spec.name, wide, begin * columns * rows.dtype.itemsize, packed_crc
                )
            else:
                module = tensor.spec.module
                packed_crc = self._writer.write(
                    module + dialect.packed_suffix, packed, begin * columns // 2, packed_crc
                )
                scale_crc = self._writer.write(
                    module + dialect.block_scale_suffix, block_scale, begin * columns // BLOCK_SIZE, scale_crc
                )
        if dialect is None:
            record["crc"][tensor.spec.name] = packed_crc
        else:
            module = tensor.spec.module
            stored = np.float32(1.0) / tensor_scale if dialect.reciprocal else tensor_scale
            name = module + dialect.tensor_scale_suffix
            record["crc"] |= {
                module + dialect.packed_suffix: packed_crc,
                module + dialect.block_scale_suffix: scale_crc,
                name: self._writer.write(name, np.array([stored], dtype="<f4")),
            }
        record["errors"][tensor.spec.name] = [squared_error, energy]


def _rounded_values(
    packed: npt.NDArray[np.uint8], block_scale: npt.NDArray[np.uint8], tensor_scale: np.float32, dtype: str
) -> npt.NDArray[np.generic]:
    """The decoded values in the source's own type, as bits where numpy lacks it."""
    shape = (packed.shape[0], packed.shape[1] * 2)
    wide: npt.NDArray[Any] = np.empty(shape, dtype=np.uint16 if dtype == "BF16" else np.float32)
    fast_cpu.decode_into(packed, fast_cpu.effective_scale(block_scale, tensor_scale), wide)
    return wide if dtype == "BF16" else narrow(wide, dtype)
