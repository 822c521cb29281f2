"""Backends that run packed weights, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Final

import torch

from omnifp4.errors import OmniFP4Error
from omnifp4.runtime.backends.base import Backend
from omnifp4.runtime.backends.compiled_cpu import CompiledCpuBackend
from omnifp4.runtime.backends.torch_ops import TorchBackend
from omnifp4.runtime.backends.triton_cuda import TritonBackend

__all__ = ["BACKENDS", "Backend", "backend_for", "choose_backend"]

BACKENDS: Final[dict[str, Callable[[], Backend]]] = {
    CompiledCpuBackend.name: CompiledCpuBackend,
    TritonBackend.name: TritonBackend,
    TorchBackend.name: TorchBackend,
}
"""Every backend by name; kernels add theirs here."""


def choose_backend(device: torch.device | str, requested: str = "auto") -> tuple[Backend, str]:
    """The backend for weights on `device`, and why.

    Args:
        device: where the weights will be.
        requested: a name of `BACKENDS`, or ``"auto"``. What is requested is never replaced by another.

    Raises:
        OmniFP4Error: the requested backend does not exist or cannot run there.
    """
    device = torch.device(device)
    if requested != "auto":
        if requested not in BACKENDS:
            raise OmniFP4Error(f"backend {requested!r} is unknown; known are auto, {', '.join(BACKENDS)}")
        if reason := why_not(requested, device):
            raise OmniFP4Error(f"backend {requested!r} cannot run on {device}: {reason}", hint="use backend='auto'")
        return BACKENDS[requested](), "it was asked for"
    if device.type == "cuda":
        reason = why_not(TritonBackend.name, device)
        if not reason:
            return TritonBackend(), "the weights are on a CUDA GPU, where Triton kernels read them packed"
        return TorchBackend(), f"no kernels run here: {reason}"
    reason = why_not(CompiledCpuBackend.name, device)
    if not reason:
        return CompiledCpuBackend(), "the weights are in host memory, where compiled loops unpack fastest"
    return TorchBackend(), f"no compiled backend runs here: {reason}"


_chosen: dict[tuple[torch.device, str], Backend] = {}


def backend_for(device: torch.device, requested: str = "auto") -> Backend:
    """The backend that `choose_backend` chose for this device when it was first asked."""
    key = (device, requested)
    if key not in _chosen:
        _chosen[key], _ = choose_backend(device, requested)
    return _chosen[key]


def why_not(name: str, device: torch.device) -> str:
    """Why a backend cannot run on `device`; empty if it can."""
    if name == CompiledCpuBackend.name:
        if device.type != "cpu":
            return f"{name} reads host memory, not {device.type}"
        if find_spec("numba") is None:
            return f"{name} needs numba, which is not installed"
    if name == TritonBackend.name:
        if device.type != "cuda":
            return f"{name} runs on a CUDA GPU, not on {device.type}"
        if find_spec("triton") is None:
            return f"{name} needs triton, which is not installed"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{name} needs compute capability 8.0 or newer"
    return ""
