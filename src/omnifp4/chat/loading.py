"""A model and its processor, from a path or from what the caller has loaded."""

from __future__ import annotations

import os
from typing import Any

from omnifp4.chat.errors import ChatError, need

MODEL_TYPE = "qwen3_omni_moe"
"""The models whose prompt, positions and talker this room knows."""


def open_model(model: Any, processor: Any, *, device: str | None, speech: bool) -> tuple[Any, Any]:
    """Loads what is not loaded.

    Args:
        model: a folder or Hub id, or a loaded ``Qwen3OmniMoeForConditionalGeneration``.
        processor: the checkpoint's; None reads it from where the model came from.
        device: to load to; None chooses.
        speech: load the talker too.

    Raises:
        ChatError: not an omni model, or its processor cannot be found.
    """
    if isinstance(model, str | os.PathLike):
        processor = processor if processor is not None else open_processor(os.fspath(model))
        from omnifp4.runtime import load

        model = load(os.fspath(model), device=device or "auto", speech=speech)
    from omnifp4.runtime.quantizer import mend_talker

    if not hasattr(model, "thinker"):
        raise ChatError(
            f"{type(model).__name__} is not an omni model: it has no thinker",
            hint="load it with omnifp4.load or Qwen3OmniMoeForConditionalGeneration, not with AutoModelForCausalLM",
        )
    kind = getattr(model.config, "model_type", None)
    if kind != MODEL_TYPE:
        raise ChatError(f"cannot chat with a model of type {kind!r}", hint=f"allowed: {MODEL_TYPE}")
    if processor is None:
        origin = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
        if not origin:
            raise ChatError("the model does not say where it came from", hint="give its processor too: processor=…")
        processor = open_processor(origin)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "feature_extractor"):
        raise ChatError(
            f"{type(processor).__name__} is not an omni model's processor",
            hint="Qwen3OmniMoeProcessor, not a tokenizer",
        )
    model.eval()
    mend_talker(model)
    return model, processor


def open_processor(origin: str) -> Any:
    """The processor of a checkpoint.

    Raises:
        ChatError: a library that it needs is missing, or its files are.
    """
    from omnifp4.runtime.torchvision_on_cpu import declare_missing_operators

    declare_missing_operators()
    transformers = need("transformers", "chat")
    need("torchvision", "the processor's video part")
    try:
        return transformers.AutoProcessor.from_pretrained(origin)
    except Exception as error:  # damaged files raise whatever, tokenizers a plain Exception
        told = " ".join(str(error).split())
        raise ChatError(f"cannot read the processor of {origin}: {told}", hint="omnifp4 doctor MODEL") from error
