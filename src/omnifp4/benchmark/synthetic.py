"""A model of real shape with random weights, made where it runs: no checkpoint, no copy through the host.

Its modules are put together as loading does it, from the headers of a checkpoint that is nowhere. Random numbers keep
every figure honest: routers choose freely, no weight is zero, and rotary tables and other computed buffers are those
that Transformers computes.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import Any, Final

import torch
from torch import Tensor, nn

from omnifp4.benchmark.headers import Headers, imagine, shape_config
from omnifp4.benchmark.parts import drop_towers
from omnifp4.formats.nvfp4 import E2M1_VALUES, E4M3_VALUES
from omnifp4.runtime.loading import CLASSES
from omnifp4.runtime.names import Renaming
from omnifp4.runtime.packed import NVFP4Linear, PackedExperts, PackedModule
from omnifp4.runtime.placement import place
from omnifp4.runtime.quantizer import mend_talker, put_packed
from omnifp4.runtime.registration import register
from omnifp4.tiny.weights import draw_for

LEAST_SCALE_BITS: Final = 0x30
MOST_SCALE_BITS: Final = 0x40
"""Block scales are drawn from these E4M3 bit patterns: 0.5 to 1.875, two octaves as in trained weights."""

CHUNK: Final = 1 << 28
"""Elements drawn at once."""


def make_model(
    name: str, *, packed: bool, parts: str, layers: int | None, seed: int, device: torch.device, backend: str = "auto"
) -> Any:
    """Makes a Transformers model of a known shape with random weights.

    Args:
        name: one of `SYNTHETIC`.
        packed: experts and attention of the thinker in NVFP4, by the default recipe; otherwise all BF16.
        parts: what is made: ``text``, ``thinker`` or ``all``.
        layers: of the thinker's text decoder; None keeps the config's.
        seed: the same seed gives the same weights on the same kind of device.
        device: where it is made.
        backend: as `choose_backend` takes it.

    Returns:
        The model, in evaluation mode, dtype BF16.

    Raises:
        OmniFP4Error: no such shape or number of layers.
    """
    register()
    import transformers

    headers = imagine(name, _with_speech(shape_config(name, layers), parts == "all"), packed=packed)
    config = transformers.AutoConfig.for_model(**headers.config)
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[config.model_type])._from_config(config, dtype=torch.bfloat16)
    renaming = Renaming(model)
    spreads = _spreads(headers, renaming)
    if packed:
        put_packed(model, place(model, headers.checkpoint.tensors, renaming, name), backend)
    if parts == "text":
        drop_towers(model)
    random = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        _fill_parameters(model, spreads, device, random)
        _compute_buffers(model, device)
        for module in model.modules():
            if isinstance(module, PackedModule):
                _fill_packed(module, device, random)
    model.config.name_or_path = f"synthetic {name}"
    mend_talker(model)
    return model.eval()


def _with_speech(config: dict[str, Any], speech: bool) -> dict[str, Any]:
    if "enable_audio_output" in config or not speech:
        config["enable_audio_output"] = speech
    return config


def _spreads(headers: Headers, renaming: Renaming) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each parameter, by its name in memory."""
    spreads: dict[str, tuple[float, float]] = {}
    for spec in headers.wide:
        draw = draw_for(spec.name, spec.shape, spec.is_linear)
        spreads.setdefault(renaming.target(spec.name), (draw.mean, draw.std))
    return spreads


def _fill_parameters(
    model: nn.Module, spreads: dict[str, tuple[float, float]], device: torch.device, random: torch.Generator
) -> None:
    for name, parameter in list(model.named_parameters()):
        mean, std = spreads[name]
        made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        flat = made.view(-1)
        for begin in range(0, flat.numel(), CHUNK):
            flat[begin : begin + CHUNK].normal_(mean, std, generator=random)
        parent, _, own = name.rpartition(".")
        filled = nn.Parameter(made, requires_grad=False)
        # Transformers must not draw it again when it computes the buffers.
        vars(filled)["_is_hf_initialized"] = True
        model.get_submodule(parent).register_parameter(own, filled)


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Lets Transformers compute what no checkpoint holds: rotary tables, positions of sound, offsets of codes."""
    named = [
        (module, name, buffer)
        for module in model.modules()
        if not isinstance(module, PackedModule)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in named:
        unset = float("nan") if buffer.is_floating_point() else -1
        module._buffers[name] = torch.full(buffer.shape, unset, dtype=buffer.dtype, device=device)
        # Of what Transformers initializes, experts alone are named by a module above them; they have no buffers there.
        vars(module).pop("_is_hf_initialized", None)
    model.initialize_weights()
    for module, name, _ in named:
        made = module._buffers[name]
        if bool((made.isnan() if made.is_floating_point() else made == -1).any()):
            raise RuntimeError(f"Transformers computed no {name} for {type(module).__name__}")


def _fill_packed(module: PackedModule, device: torch.device, random: torch.Generator) -> None:
    """Uniform codes, block scales in a narrow range, and the tensor scale that makes weights 1/sqrt(inputs) wide."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        if name.endswith("packed"):
            module._buffers[name] = _bytes(buffer, 0, 256, device, random)
        elif name.endswith("block_scale"):
            module._buffers[name] = _bytes(buffer, LEAST_SCALE_BITS, MOST_SCALE_BITS, device, random)
    unit = _unit_spread()
    if isinstance(module, NVFP4Linear):
        scale = 1 / sqrt(module.in_features) / unit
        module.tensor_scale = torch.full((), 1 / scale if module.reciprocal else scale, device=device)
    elif isinstance(module, PackedExperts):
        for part, inputs in (("gate_up", module.hidden_dim), ("down", module.intermediate_dim)):
            scale = 1 / sqrt(inputs) / unit
            value = 1 / scale if module.reciprocal else scale
            setattr(module, f"{part}_tensor_scale", torch.full((module.num_experts,), value, device=device))
    module.finish_loading()


def _bytes(like: Tensor, least: int, most: int, device: torch.device, random: torch.Generator) -> Tensor:
    """Uniform bytes from `least` to below `most`, in the shape of `like`."""
    made = torch.empty(like.shape, dtype=torch.uint8, device=device)
    flat = made.view(-1)
    for begin in range(0, prod(like.shape), CHUNK):
        flat[begin : begin + CHUNK].random_(least, most, generator=random)
    return made


def _unit_spread() -> float:
    """Standard deviation of code * block scale, both uniform."""
    codes = sum(float(value) ** 2 for value in E2M1_VALUES) / len(E2M1_VALUES)
    scales = [float(E4M3_VALUES[bits]) ** 2 for bits in range(LEAST_SCALE_BITS, MOST_SCALE_BITS)]
    return sqrt(codes * sum(scales) / len(scales))
