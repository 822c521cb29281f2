"""What of a model is loaded, and how many bytes each part of it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor

from omnifp4.runtime.packed import PackedModule

TOWERS: Final = ("audio_tower", "visual")

SPEECH_PARTS: Final = ("talker", "code predictor", "code2wav")
TEXT_PARTS: Final = ("experts", "attention", "routers and norms", "head", "embeddings")

_MARKS: Final = (
    ("talker.code_predictor.", "code predictor"),
    ("talker.", "talker"),
    ("code2wav.", "code2wav"),
    ("audio_tower.", "audio tower"),
    ("visual.", "vision tower"),
    ("lm_head.", "head"),
    ("embed_tokens.", "embeddings"),
    (".experts.", "experts"),
    (".self_attn.", "attention"),
)
"""First match counts; these parts of names are the same on disk and in every version of Transformers."""


def part_of(name: str) -> str:
    """The part of an omni model that a tensor belongs to."""
    part = next((part for mark, part in _MARKS if mark in name), "routers and norms")
    # q_norm and k_norm are vectors inside of attention.
    return "routers and norms" if part == "attention" and "_norm." in name else part


def tensors_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of a model, shared ones once."""
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            yield name, tensor


def part_bytes(model: Any) -> dict[str, int]:
    """Bytes on the device by part, in the order of the model."""
    found: dict[str, int] = {}
    for name, tensor in tensors_of(model):
        part = part_of(name)
        found[part] = found.get(part, 0) + tensor.numel() * tensor.element_size()
    return found


def parts_text(weights: dict[str, int]) -> str:
    """The loaded parts for people, such as ``text decoder, audio tower, vision tower``."""
    others = [part for part in weights if part not in TEXT_PARTS]
    return ", ".join(["text decoder", *others])


def drop_towers(model: Any) -> None:
    """Leave the text decoder alone: takes the audio and the vision tower out of a model."""
    for module in list(model.modules()):
        for tower in TOWERS:
            if tower in module._modules:
                module._modules[tower] = None


def weights_text(model: Any) -> str:
    """What the weights are in, such as ``NVFP4: attention, experts; else BF16``."""
    packed = {part_of(f"{name}.x") for name, module in model.named_modules() if isinstance(module, PackedModule)}
    wide = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    names = " and ".join(sorted({"bfloat16": "BF16", "float32": "F32"}.get(one, one) for one in wide))
    return f"NVFP4: {', '.join(sorted(packed))}; else {names}" if packed else names
