"""The wide tensors of a checkpoint as Transformers' loader takes them: read one by one, when it asks, and counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.runtime.progress import LoadProgress
from omnifp4.runtime.staging import Run, Stager

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class WideTensor:
    """One tensor on disk; indexing it with ``...`` reads it. Has what Transformers asks of a safetensors slice."""

    def __init__(self, entry: TensorEntry, stager: Stager, device: torch.device) -> None:
        """`device` is where the tensor is read to; Transformers may move it on."""
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"tensor {entry.name!r} of {entry.shard} is {entry.dtype}, which torch does not have")
        self._entry, self._stager, self._device = entry, stager, device

    def get_dtype(self) -> str:
        """The dtype's name in the header."""
        return self._entry.dtype

    def get_shape(self) -> list[int]:
        """The shape."""
        return list(self._entry.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._entry.shape

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self._entry.dtype]

    def is_floating_point(self) -> bool:
        """Whether it holds floats."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        entry = self._entry
        raw = torch.empty(entry.nbytes, dtype=torch.uint8, device=self._device)
        if entry.nbytes:
            self._stager.read(Run((entry,), raw))
        return raw.view(self.dtype).reshape(entry.shape)[index]


def wide_tensors(
    entries: Iterable[TensorEntry], reader: CheckpointReader, progress: LoadProgress, device: torch.device
) -> dict[str, WideTensor]:
    """A state dict whose tensors are read when they are used."""
    stager = Stager(reader, progress)
    found = {entry.name: WideTensor(entry, stager, device) for entry in entries}
    progress.expect(sum(item._entry.nbytes for item in found.values()))
    return found
