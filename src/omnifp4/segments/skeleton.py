"""The stock thinker with all its modules and no memory, and which of its parts a checkpoint's tensors belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.errors import CheckpointError, ModelError
from omnifp4.models.base import is_buffer
from omnifp4.runtime.names import OPTIONAL_PARTS, Renaming

MODEL_TYPES: Final = ("qwen3_omni_moe",)
"""Omni models; their thinker is run."""
TEXT_TYPES: Final = ("qwen3_moe", "qwen3", "llama")
"""Models that read and write text alone."""

EMBEDDINGS: Final = "embeddings"
AUDIO: Final = "audio tower"
VISION: Final = "vision tower"
NORM: Final = "norm"
HEAD: Final = "head"
TALKER: Final = "talker"

_TEXT: Final = r"^(?:thinker\.)?model\.(?:language_model\.)?"
_NAMES: Final = (
    (EMBEDDINGS, re.compile(_TEXT + r"embed_tokens\.")),
    (NORM, re.compile(_TEXT + r"norm\.")),
    (AUDIO, re.compile(r"^(?:thinker\.)?(?:model\.)?audio_tower\.")),
    (VISION, re.compile(r"^(?:thinker\.)?(?:model\.)?visual\.")),
    (HEAD, re.compile(r"^(?:thinker\.)?lm_head\.")),
)
_LAYER: Final = re.compile(_TEXT + r"layers\.(\d+)\.")


def layer_part(number: int) -> str:
    """The name of a decoder layer's part."""
    return f"layer {number}"


@dataclass(slots=True)
class Part:
    """A piece of the model that is loaded and freed as a whole.

    Attributes:
        name: one of the names above, or of `layer_part`.
        module: in the skeleton.
        entries: its tensors on disk.
        sources: checkpoint names of its linears and expert groups, and their modules; filled when it is first loaded.
    """

    name: str
    module: nn.Module
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    sources: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """On disk."""
        return sum(entry.nbytes for entry in self.entries.values())


class Skeleton:
    """The thinker on the meta device.

    Attributes:
        model: the omni model, without talker unless `speech`, or the model of text.
        thinker: its thinker, or the model of text itself.
        text: the thinker's text decoder.
        towers: what owns the towers and has ``get_image_features`` and its siblings; None in a model of text.
        renaming: Transformers' own renaming of checkpoint names.
        parts: by name.
        dtype: of parameters.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, speech: bool = False
    ) -> None:
        """Builds it and makes the few buffers that no checkpoint has.

        Args:
            checkpoint: of the model.
            dtype: of parameters.
            device: of the buffers.
            speech: with the talker as one more part.

        Raises:
            ModelError: not a model whose thinker this room knows.
            CheckpointError: a tensor belongs to no part, or a layer has none.
        """
        kind = checkpoint.config.get("model_type")
        if kind not in (*MODEL_TYPES, *TEXT_TYPES):
            raise ModelError(
                f"{checkpoint.location}: a model of type {kind!r} cannot run in segments",
                hint=f"allowed: {', '.join((*MODEL_TYPES, *TEXT_TYPES))}; run it as a whole",
            )
        omni = kind in MODEL_TYPES
        self.dtype = dtype
        try:
            self.model = _build(checkpoint, dtype, speech) if omni else _build_text(checkpoint, dtype)
        except Exception as error:  # a value in the config that Transformers' own code stumbles over
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelError(
                f"{checkpoint.location}: Transformers cannot make a model of its config.json: {told}",
                hint="compare it with the released model's",
            ) from error
        self.thinker = self.model.thinker if omni else self.model
        self.text = self.thinker.get_decoder()
        self.towers = None
        if omni:
            self.towers = self.thinker if hasattr(self.thinker, "audio_tower") else self.thinker.model
        self.renaming = Renaming(self.model)
        self.parts = self._parts(checkpoint)
        _make_buffers(self.model, device)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.text.layers)

    def _parts(self, checkpoint: Checkpoint) -> dict[str, Part]:
        modules: dict[str, nn.Module] = {
            EMBEDDINGS: self.text.embed_tokens,
            NORM: self.text.norm,
            HEAD: self.thinker.lm_head,
        }
        if self.towers is not None:
            modules |= {AUDIO: self.towers.audio_tower, VISION: self.towers.visual}
        if hasattr(self.model, "talker"):
            modules[TALKER] = self.model.talker
        modules |= {layer_part(number): layer for number, layer in enumerate(self.text.layers)}
        parts = {name: Part(name, module) for name, module in modules.items()}
        for name, entry in checkpoint.tensors.items():
            optional = name.partition(".")[0] in OPTIONAL_PARTS
            if optional and not (TALKER in parts and name.startswith(f"{TALKER}.")):
                continue
            part = parts.get(TALKER if optional else part_of(name))
            if part is None:
                if is_buffer(name):
                    continue
                raise CheckpointError(f"{checkpoint.location}/{entry.shard}: tensor {name!r} has no place in the model")
            part.entries[name] = entry
        # Some models of text have no head of their own: their embeddings are the head.
        tied = self.towers is None and self.text.config.tie_word_embeddings
        heads = () if tied else (HEAD,)
        for needed in (EMBEDDINGS, NORM, *heads, *map(layer_part, range(self.layers))):
            if not parts[needed].entries:
                raise CheckpointError(f"{checkpoint.location}: no tensor of the {needed} is there")
        return parts


def part_of(name: str) -> str:
    """The part that a tensor of the thinker is of, by its checkpoint name; empty if it is of none."""
    if layer := _LAYER.match(name):
        return layer_part(int(layer[1]))
    return next((part for part, pattern in _NAMES if pattern.match(name)), "")


def _build(checkpoint: Checkpoint, dtype: torch.dtype, speech: bool) -> Any:
    from omnifp4.runtime.torchvision_on_cpu import declare_missing_operators

    declare_missing_operators()
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.location)
    config.enable_audio_output = speech
    with torch.device("meta"):
        omni: Any = transformers.Qwen3OmniMoeForConditionalGeneration
        model = omni._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def _build_text(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.location)
    with torch.device("meta"):
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def _make_buffers(model: Any, device: torch.device) -> None:
    """Frequencies and tables that are computed and stand in no checkpoint; Transformers' own code computes them."""
    for name, module in model.named_modules():
        if name.startswith("code2wav"):
            # Never run in segments.
            continue
        missing: Mapping[str, torch.Tensor] = {
            key: module._buffers[key]
            for key in module._non_persistent_buffers_set
            if module._buffers.get(key) is not None
        }
        for key, buffer in missing.items():
            module._buffers[key] = torch.full_like(buffer, torch.nan, device=device)
        if missing:
            model._init_weights(module)
        for key in missing:
            if not bool(module._buffers[key].isfinite().all()):
                raise ModelError(f"buffer '{name}.{key}' is computed in a way that is not known here")
