"""Where the arithmetic is done."""

from __future__ import annotations

import torch

from omnifp4.errors import OmniFP4Error


def find_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the first GPU, or the CPU.

    Raises:
        OmniFP4Error: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OmniFP4Error(f"device is {name!r}", hint="allowed: auto, cpu, cuda, cuda:0 …")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OmniFP4Error(f"device {name!r} was asked for, and torch sees no GPU", hint="omnifp4 doctor tells why")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OmniFP4Error(f"device {name!r} was asked for, and torch sees {torch.cuda.device_count()} GPUs")
    return device


def name_of_device(device: torch.device) -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def arithmetic_of_device(device: torch.device) -> str:
    """What the last bits depend on: the GPU's name, or the CPU's vector instructions."""
    if device.type == "cuda":
        return name_of_device(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"
