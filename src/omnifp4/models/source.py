"""Joins a wide checkpoint's files to its layout: where on disk the bytes of each logical tensor are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dtypes import NUMPY_DTYPES, WIDE_FLOATS, byte_count
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.models import layout_for
from omnifp4.models.base import Layout, TensorSpec, is_buffer

QUANTIZED_ENDINGS: Final = (
    ".weight_scale", ".weight_scale_2", ".weight_packed", ".weight_global_scale", "_amax", ".weight_scale_inv", ".qweight",
    ".absmax", ".SCB", "_blocks", "_scales",
)  # fmt: skip
"""Ends of names that quantized checkpoints have, of NVFP4 and of other formats: FP8, GPTQ, AWQ, bitsandbytes, MXFP4."""


@dataclass(frozen=True, slots=True)
class FusedSlice:
    """One projection of one expert inside a 3-D tensor.

    Attributes:
        expert: index along the first dimension.
        part: index of the projection along the output dimension.
        parts: number of projections there.
        transposed: the expert is stored ``[in, parts * out]`` instead of ``[parts * out, in]``.
    """

    expert: int
    part: int
    parts: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A logical tensor and the bytes that hold it.

    Attributes:
        spec: what the layout says of it.
        entry: the tensor on disk that it is, or is part of.
        fused: which part, where `entry` is a fused 3-D tensor.
    """

    spec: TensorSpec
    entry: TensorEntry
    fused: FusedSlice | None = None

    @property
    def rows_divide(self) -> bool:
        """Whether a range of rows can be read alone: not where experts are stored transposed."""
        return self.fused is None or not self.fused.transposed

    @property
    def nbytes(self) -> int:
        """Bytes of the logical tensor."""
        return byte_count(self.entry.dtype, self.spec.shape)

    def read(self, reader: CheckpointReader) -> npt.NDArray[np.generic]:
        """Its bits as a fresh contiguous array of ``spec.shape``; reads no more than one expert of a fused tensor."""
        if self.rows_divide:
            buffer = np.empty(self.nbytes, dtype=np.uint8)
            rows = self.spec.shape[0] if self.spec.shape else 1
            return self.read_rows(reader, 0, rows, buffer).reshape(self.spec.shape)
        return self._read_transposed(reader)

    def read_rows(
        self, reader: CheckpointReader, begin: int, end: int, buffer: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.generic]:
        """Rows ``begin`` to ``end`` as a view of the front of `buffer`, ``[end - begin, ...]``.

        Raises:
            ValueError: the tensor is stored transposed, so that its rows cannot be read alone.
        """
        if not self.rows_divide:
            raise ValueError(f"{self.spec.name} is stored transposed in {self.entry.name}")
        rows = self.spec.shape[0] if self.spec.shape else 1
        row_bytes = self.nbytes // rows if rows else 0
        offset = 0
        if self.fused is not None:
            offset = (self.fused.expert * self.fused.parts + self.fused.part) * self.nbytes
        view = buffer[: (end - begin) * row_bytes]
        reader.read_into(self.entry, view, offset + begin * row_bytes)
        return view.view(NUMPY_DTYPES[self.entry.dtype]).reshape(end - begin, *self.spec.shape[1:])

    def _read_transposed(self, reader: CheckpointReader) -> npt.NDArray[np.generic]:
        assert self.fused is not None
        experts, rows, columns = self.entry.shape
        buffer = np.empty(self.entry.nbytes // experts, dtype=np.uint8)
        reader.read_into(self.entry, buffer, self.fused.expert * buffer.nbytes)
        width = columns // self.fused.parts
        matrix = buffer.view(NUMPY_DTYPES[self.entry.dtype]).reshape(rows, columns)
        return np.ascontiguousarray(matrix[:, self.fused.part * width : (self.fused.part + 1) * width].T)


@dataclass(frozen=True)
class Source:
    """A wide checkpoint whose every tensor has a place in its layout.

    Attributes:
        checkpoint: its files.
        layout: what they should hold.
        tensors: in layout order, without optional ones that are absent.
        buffers: tensors outside the layout that loaders compute anew; they are copied as they are.
    """

    checkpoint: Checkpoint
    layout: Layout
    tensors: tuple[SourceTensor, ...]
    buffers: tuple[TensorEntry, ...] = ()


def match_source(checkpoint: Checkpoint) -> Source:
    """Find every tensor that the config calls for.

    Raises:
        ModelError: unknown model_type or unusable config.
        CheckpointError: already quantized; a tensor missing, unknown, or of the wrong shape or type.
    """
    layout = layout_for(checkpoint.config, checkpoint.tensors)
    _refuse_quantized(checkpoint)
    if unknown := layout.unknown(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.location}: tensor {unknown[0]!r}{_more(unknown)} has no place in a {layout.model_type} of this "
            "config"
        )
    if missing := layout.missing(checkpoint.tensors):
        raise CheckpointError(f"{checkpoint.location}: tensor {missing[0]!r}{_more(missing)} is missing")
    inside = _inside_fused(checkpoint, layout)
    found: list[SourceTensor] = []
    for spec in layout.tensors:
        entry = checkpoint.tensors.get(spec.name)
        if entry is not None:
            if spec.name in inside:
                raise CheckpointError(
                    f"{checkpoint.location}: tensor {spec.name!r} is there twice, alone and in {inside[spec.name][0].name}"
                )
            if entry.shape != spec.shape:
                raise CheckpointError(
                    f"{checkpoint.location}/{entry.shard}: tensor {spec.name!r} is {list(entry.shape)} where the config "
                    f"makes it {list(spec.shape)}"
                )
            found.append(SourceTensor(spec, entry))
        elif spec.name in inside:
            found.append(SourceTensor(spec, *inside[spec.name]))
    for tensor in found:
        if tensor.spec.is_linear and tensor.entry.dtype not in WIDE_FLOATS:
            raise CheckpointError(
                f"{checkpoint.location}/{tensor.entry.shard}: tensor {tensor.entry.name!r} is {tensor.entry.dtype}; "
                f"a weight must be one of {', '.join(WIDE_FLOATS)}"
            )
    buffers = tuple(
        entry for name, entry in checkpoint.tensors.items() if name not in layout.by_name and is_buffer(name)
    )
    return Source(checkpoint, layout, tuple(found), buffers)


def _inside_fused(checkpoint: Checkpoint, layout: Layout) -> dict[str, tuple[TensorEntry, FusedSlice]]:
    inside: dict[str, tuple[TensorEntry, FusedSlice]] = {}
    shapes = {name: checkpoint.tensors[name].shape for name in layout.fused_names if name in checkpoint.tensors}
    for name in layout.fused_names:
        entry = checkpoint.tensors.get(name)
        if entry is None:
            continue
        form = layout.fused_form(name, entry.shape, shapes)
        if form is None:
            allowed = " or ".join(str(list(shape)) for shape in layout.fused_shapes(name))
            raise CheckpointError(
                f"{checkpoint.location}/{entry.shard}: tensor {name!r} is {list(entry.shape)} where the config makes "
                f"it {allowed}"
            )
        for expert in range(form.shape[0]):
            for index, part in enumerate(form.parts):
                piece = FusedSlice(expert, index, len(form.parts), form.transposed)
                inside[form.expert_tensor(expert, part)] = (entry, piece)
    return inside


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    for name in checkpoint.tensors:
        if name.endswith(QUANTIZED_ENDINGS):
            raise CheckpointError(
                f"{checkpoint.location}: tensor {name!r} shows that it is already quantized; a wide checkpoint is needed",
                hint="use omnifp4 verify, convert or repair on it",
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
