"""What is measured: a checkpoint, or a synthetic model of a known shape; and getting it to the device."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import torch

from omnifp4.benchmark.clock import forget_peak, free_memory, now, peak_bytes
from omnifp4.benchmark.headers import SYNTHETIC
from omnifp4.benchmark.parts import drop_towers
from omnifp4.errors import OmniFP4Error

FORMATS: Final = ("nvfp4", "bf16")
"""Of the weights of a synthetic model."""

MODEL_TYPE: Final = "qwen3_omni_moe"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be measured.

    Attributes:
        location: checkpoint folder or Hub id; empty for a synthetic model.
        shape: name of a synthetic shape; empty for a checkpoint.
        weights: of `FORMATS`, for a synthetic model.
        layers: cut a synthetic model to so many decoder layers.
        revision: of a Hub id.

    Raises:
        OmniFP4Error: neither or both of location and shape, or what does not go with one of them.
    """

    location: str = ""
    shape: str = ""
    weights: str = "nvfp4"
    layers: int | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Checks every value."""
        if bool(self.location) == bool(self.shape):
            raise OmniFP4Error("bench needs one model: MODEL or --synthetic NAME", hint=f"NAME: {', '.join(SYNTHETIC)}")
        if self.shape and self.shape not in SYNTHETIC:
            raise OmniFP4Error(f"there is no synthetic shape {self.shape!r}", hint=f"known: {', '.join(SYNTHETIC)}")
        if self.weights not in FORMATS:
            raise OmniFP4Error(f"format is {self.weights!r}", hint=f"allowed: {', '.join(FORMATS)}")
        if self.layers is not None and (self.location or self.layers < 1):
            raise OmniFP4Error(f"layers is {self.layers}", hint="from 1, and of a synthetic model only")

    @property
    def name(self) -> str:
        """For people."""
        if self.location:
            return self.location
        return f"synthetic {self.shape}" + (f", cut to {self.layers} layer(s)" if self.layers is not None else "")


@dataclass(frozen=True)
class Loaded:
    """A model on the device.

    Attributes:
        load_seconds: from files; None for a synthetic model.
        make_seconds: of a synthetic model; None for a loaded one.
        peak_bytes: most in use meanwhile; None on a processor.
    """

    model: Any
    load_seconds: float | None
    make_seconds: float | None
    peak_bytes: int | None


def open_subject(subject: Subject, *, parts: str, seed: int, device: torch.device) -> Loaded:
    """Brings a model to the device, with the parts asked for.

    Raises:
        OmniFP4Error: no such model, no omni model, or no speech in it though it was asked for.
    """
    # Imported before the clock starts: that takes seconds, once a process.
    import_module("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")
    free_memory(device)
    forget_peak(device)
    begin = now(device)
    if subject.shape:
        from omnifp4.benchmark.synthetic import make_model

        model = make_model(
            subject.shape, packed=subject.weights == "nvfp4", parts=parts, layers=subject.layers, seed=seed, device=device
        )  # fmt: skip
    else:
        model = _load(subject, parts, device)
    seconds = now(device) - begin
    kind = getattr(model.config, "model_type", None)
    if kind != MODEL_TYPE:
        raise OmniFP4Error(
            f"{subject.name}: bench cannot measure a model of type {kind!r}", hint=f"allowed: {MODEL_TYPE}"
        )
    if parts == "all" and not hasattr(model, "talker"):
        raise OmniFP4Error(f"{subject.name}: there is no talker in it", hint="--parts thinker")
    loaded = subject.location
    return Loaded(model, seconds if loaded else None, None if loaded else seconds, peak_bytes(device))


def _load(subject: Subject, parts: str, device: torch.device) -> Any:
    from omnifp4.runtime import load

    model = load(subject.location, device=device, revision=subject.revision, speech=parts == "all")
    if parts == "text":
        drop_towers(model)
        free_memory(device)
    return model
