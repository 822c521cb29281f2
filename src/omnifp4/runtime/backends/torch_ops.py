"""Unpacking with plain torch operations: the reference, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omnifp4.formats.nvfp4 import BLOCK_SIZE, E2M1_VALUES, E4M3_VALUES
from omnifp4.runtime.backends.base import Backend

if TYPE_CHECKING:
    from omnifp4.runtime.packed import PackedWeight


class TorchBackend(Backend):
    """See `Backend`. Equal, bit by bit, to `omnifp4.formats.fast_cpu.decode_into`."""

    name = "torch"

    def __init__(self) -> None:
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def dequantize(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """See `Backend.dequantize`."""
        pairs, e4m3 = self._tables_on(weight.packed.device)
        rows, columns = weight.shape
        scale = e4m3[weight.block_scale.int()]
        scale = scale / weight.tensor_scale if weight.reciprocal else scale * weight.tensor_scale
        values = pairs[weight.packed.int()].view(rows, columns // BLOCK_SIZE, BLOCK_SIZE)
        return values.mul_(scale.unsqueeze(-1)).view(rows, columns).to(dtype)

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The two values of every byte of codes, float32 ``[256, 2]``, and of every E4M3 byte, ``[256]``."""
        if device not in self._tables:
            codes = torch.arange(256)
            values = torch.from_numpy(E2M1_VALUES)
            pairs = torch.stack([values[codes & 15], values[codes >> 4]], dim=-1)
            self._tables[device] = (pairs.to(device), torch.from_numpy(E4M3_VALUES).to(device))
        return self._tables[device]
