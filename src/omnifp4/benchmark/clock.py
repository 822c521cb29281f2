"""Time and memory of a device. Work on a GPU is waited for before a clock is read."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable
from typing import Final

import torch

from omnifp4.receipt.bench import Spread

GPU_COPY_BYTES: Final = 1 << 30
CPU_COPY_BYTES: Final = 1 << 26
"""Larger than any cache."""
GPU_COPIES: Final = 20
CPU_COPIES: Final = 4


def now(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: Iterable[float]) -> Spread:
    """Median, least and most."""
    found = list(values)
    return Spread(median=statistics.median(found), least=min(found), most=max(found), repeats=len(found))


def copy_bandwidth(device: torch.device, repeats: int) -> tuple[Spread, int]:
    """Bytes a second of a large copy on the device, read and written together; and the bytes of one copy."""
    size, copies = (GPU_COPY_BYTES, GPU_COPIES) if device.type == "cuda" else (CPU_COPY_BYTES, CPU_COPIES)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    rates = []
    for _ in range(repeats):
        begin = now(device)
        for _ in range(copies):
            target.copy_(source)
        rates.append(2 * size * copies / (now(device) - begin))
    return spread(rates), 2 * size


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Count the peak from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that torch had in use on the GPU since `forget_peak`; None on a processor."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
