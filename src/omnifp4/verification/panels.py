"""Large tensors a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dtypes import NUMPY_DTYPES
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.models.source import SourceTensor
from omnifp4.verification.reading import PANEL_BYTES, Buffers


def original_panels(
    original: SourceTensor, reader: CheckpointReader, buffers: Buffers
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """An original a few rows at a time: the first row's number, and bits ``[rows, in]``, valid until the next ones."""
    rows, columns = original.spec.shape
    dtype = NUMPY_DTYPES[original.entry.dtype]
    step = max(1, PANEL_BYTES // max(1, columns * dtype.itemsize))
    if original.fused is not None:
        whole = original.read(reader)
        for first in range(0, rows, step):
            yield first, whole[first : first + step]
        return
    for first in range(0, rows, step):
        count = min(step, rows - first)
        raw = read_rows(reader, original.entry, first, count, columns * dtype.itemsize, buffers, "raw")
        yield first, raw.reshape(-1).view(dtype).reshape(count, columns)


def read_rows(
    reader: CheckpointReader, entry: TensorEntry, first: int, count: int, row_bytes: int, buffers: Buffers, role: str
) -> npt.NDArray[np.uint8]:
    """Rows of a tensor as bytes ``[count, row_bytes]``, valid until `role` is read again."""
    buffer = buffers.take(role, count * row_bytes)
    reader.read_into(entry, buffer, first * row_bytes)
    return buffer.reshape(count, row_bytes)
