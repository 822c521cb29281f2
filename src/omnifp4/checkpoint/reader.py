"""Reading tensors' bytes: positioned reads, so that threads share a file and memory stays what the caller holds."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dtypes import NUMPY_DTYPES
from omnifp4.checkpoint.folder import Checkpoint, safe_path
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.errors import CheckpointError


class CheckpointReader:
    """Reads tensors of a local checkpoint; safe to use from several threads at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open every shard; raises CheckpointError if one cannot be opened."""
        if checkpoint.folder is None:
            raise CheckpointError(f"{checkpoint.location}: only its headers are here", hint="download it first")
        self.checkpoint = checkpoint
        self._files: dict[str, int] = {}
        try:
            for shard in checkpoint.shard_bytes:
                self._files[shard] = os.open(safe_path(checkpoint.folder, shard), os.O_RDONLY)
        except OSError as error:
            self.close()
            raise CheckpointError(f"{checkpoint.folder / shard}: cannot be opened: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every shard."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def file_descriptor(self, shard: str) -> int:
        """The open file of a shard, for copies inside the kernel."""
        return self._files[shard]

    def read_into(self, entry: TensorEntry, buffer: npt.NDArray[np.uint8], offset: int = 0) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on; raises CheckpointError if the file ends early."""
        # A view of nothing cannot be cast.
        view, position = buffer.data.cast("B") if buffer.size else memoryview(b""), entry.begin + offset
        if offset + len(view) > entry.nbytes:
            raise ValueError(f"{entry.name}: {offset + len(view)} bytes asked of {entry.nbytes}")
        while view:
            try:
                count = os.preadv(self._files[entry.shard], [view], position)
            except OSError as error:
                raise self._broken(entry, error.strerror or str(error)) from None
            if count == 0:
                raise self._broken(entry, "the file ends inside it")
            view, position = view[count:], position + count

    def read(self, entry: TensorEntry) -> npt.NDArray[np.generic]:
        """The tensor's bits as a fresh array of its shape (BF16 and FP8 as unsigned integers)."""
        if entry.dtype not in NUMPY_DTYPES:
            raise self._broken(entry, f"{entry.dtype} elements do not fill a byte each")
        buffer = np.empty(entry.nbytes, dtype=np.uint8)
        self.read_into(entry, buffer)
        return buffer.view(NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)

    def _broken(self, entry: TensorEntry, reason: str) -> CheckpointError:
        folder = self.checkpoint.folder or Path()
        return CheckpointError(f"{folder / entry.shard}: tensor {entry.name!r} cannot be read: {reason}")
