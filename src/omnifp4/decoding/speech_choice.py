"""How a model's speech is made, and why so."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from omnifp4.errors import OmniFP4Error

if TYPE_CHECKING:
    from torch import Tensor

ENGINES: Final = ("auto", "cuda-graph", "fixed", "modules", "stock")
"""Ways to speech: one CUDA graph a frame; the graph's arithmetic without a graph; Transformers' modules in our loop;
Transformers' ``generate()``."""


def check_name(requested: Any) -> None:
    """Refuses what is none of `ENGINES`."""
    if requested not in ENGINES:
        raise OmniFP4Error(f"speech_engine is {requested!r}", hint=f"allowed: {', '.join(ENGINES)}")


def choose_speech(model: Any, requested: str = "auto") -> tuple[str, str]:
    """How a model's speech is made, and why.

    Args:
        model: with a talker.
        requested: one of `ENGINES`; what is asked for by name is never replaced by another.

    Raises:
        OmniFP4Error: there is no such way, or it cannot run here.
    """
    check_name(requested)
    if requested == "stock":
        return "stock", "it was asked for"
    scattered = _why_not_in_one_place(model.talker)
    uncapturable = scattered or _why_no_graph(model.talker)
    if requested == "auto":
        if scattered:
            return "stock", f"only Transformers' own loop moves tensors between devices: {scattered}"
        if uncapturable:
            return "modules", f"no CUDA graph: {uncapturable}"
        return "cuda-graph", "the talker is on one CUDA device and all of it can be captured"
    reason = uncapturable if requested == "cuda-graph" else scattered
    if reason:
        raise OmniFP4Error(f"speech engine {requested!r} cannot run this talker: {reason}", hint="speech_engine='auto'")
    return requested, "it was asked for"


def _why_not_in_one_place(talker: Any) -> str:
    import torch

    devices = {tensor.device for tensor in tensors_of(talker)}
    if len(devices) != 1:
        return f"the talker lies on {', '.join(sorted(map(str, devices)))}"
    return "the talker's weights are not loaded" if devices == {torch.device("meta")} else ""


def _why_no_graph(talker: Any) -> str:
    if talker.device.type != "cuda":
        return f"the talker is on {talker.device}"
    for name, module in talker.named_modules():
        backend = getattr(module, "backend", None)
        if backend is not None and not getattr(backend, "capturable", False):
            return f"backend {backend.name!r} of {name} asks the host while it runs"
    return ""


def tensors_of(talker: Any) -> Iterator[Tensor]:
    """All parameters and buffers."""
    return chain(talker.parameters(), talker.buffers())
