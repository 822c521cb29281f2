"""Where a model runs, by the name that a person gives."""

from __future__ import annotations

import torch

from omnifp4.errors import OmniFP4Error


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name; ``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        OmniFP4Error: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OmniFP4Error(f"device is {str(name)!r}", hint="allowed: auto, cpu, cuda, cuda:0 …")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OmniFP4Error(
            f"device {str(name)!r} was asked for, and torch sees no GPU", hint="omnifp4 doctor tells why"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OmniFP4Error(f"device {str(name)!r} was asked for, and torch sees {torch.cuda.device_count()} GPUs")
    return device
