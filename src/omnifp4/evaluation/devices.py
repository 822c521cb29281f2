"""Where the arithmetic is done."""

from __future__ import annotations

import torch

from omnifp4.runtime.devices import find_device

__all__ = ["arithmetic_of_device", "find_device", "name_of_device"]


def name_of_device(device: torch.device) -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def arithmetic_of_device(device: torch.device) -> str:
    """What the last bits depend on: the GPU's name, or the CPU's vector instructions."""
    if device.type == "cuda":
        return name_of_device(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"
