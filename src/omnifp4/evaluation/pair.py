"""Whether two checkpoints can be compared, and whether they fit into memory: told before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from omnifp4.chat.loading import open_processor
from omnifp4.checkpoint.folder import Checkpoint, open_checkpoint
from omnifp4.errors import ModelError, OmniFP4Error
from omnifp4.runtime.stall import available_bytes
from omnifp4.segments.skeleton import MODEL_TYPES

IRRELEVANT: Final = frozenset(
    {
        "quantization_config", "compression_config", "transformers_version", "_name_or_path", "architectures", "dtype",
        "torch_dtype", "enable_audio_output", "_attn_implementation_autoset",
    }
)  # fmt: skip
"""Keys of a config that do not say what the model computes, or that differ between a model and its FP4 artifact."""

SPEECH_PARTS: Final = ("talker.", "code2wav.", "token2wav.")
WIDE_DTYPES: Final = ("BF16", "F16", "F32")
WEIGHT_ROOM: Final = 1.2
"""Weights need this many times their size: activations, the reader's buffers, the interpreter."""


@dataclass(frozen=True)
class Pair:
    """Two checkpoints that can be compared.

    Attributes:
        model, reference: opened.
        processor: the reference's.
        config: the reference's, as Transformers reads it.
        speaks: both have a talker.
        notes: what differs and does not matter to the figures.
    """

    model: Checkpoint
    reference: Checkpoint
    processor: Any
    config: Any
    speaks: bool
    notes: tuple[str, ...]


def open_pair(model: str | Path, reference: str | Path) -> Pair:
    """Open both and refuse a pair that cannot be compared.

    Raises:
        OmniFP4Error: not an omni model, other shapes, another tokenizer.
    """
    opened, against = open_checkpoint(model), open_checkpoint(reference)
    for checkpoint in (opened, against):
        kind = checkpoint.config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ModelError(
                f"{checkpoint.location}: a model of type {kind!r} cannot be evaluated",
                hint=f"allowed: {', '.join(MODEL_TYPES)}; --lm-eval takes other types",
            )
    import transformers

    config = transformers.AutoConfig.from_pretrained(against.location)
    own_config = transformers.AutoConfig.from_pretrained(opened.location)
    # As Transformers reads them: what one file leaves out and the other spells is then the same.
    if difference := next(_differences(own_config.to_dict(), config.to_dict(), ""), None):
        key, mine, theirs = difference
        raise OmniFP4Error(
            f"{opened.location} and {against.location} are no pair: {key} is {mine} in the one and {theirs} in the other",
            hint="--against takes the checkpoint that the model was made from",
        )
    processor, other = open_processor(against.location), open_processor(opened.location)
    _compare_tokenizers(opened, against, other.tokenizer, processor.tokenizer)
    notes = []
    if other.chat_template != processor.chat_template:
        notes.append("the model's chat template is not the reference's; both sides were asked in the reference's")
    if mine := _changed_preprocessing(other, processor):
        notes.append(
            f"the model's preprocessing is not the reference's, first in {mine}; both sides read the reference's"
        )
    speaks = all(any(name.startswith("talker.") for name in one.tensors) for one in (opened, against))
    return Pair(opened, against, processor, config, speaks, tuple(notes))


def _changed_preprocessing(mine: Any, theirs: Any) -> str:
    """What of pictures, sounds or videos is made otherwise; empty where nothing is."""
    for part in ("image_processor", "feature_extractor", "video_processor"):
        own, other = (
            (one.to_dict() if one is not None else {})
            for one in (getattr(mine, part, None), getattr(theirs, part, None))
        )
        if difference := next(_differences(own, other, ""), None):
            return difference[0]
    return ""


def _compare_tokenizers(model: Checkpoint, reference: Checkpoint, mine: Any, theirs: Any) -> None:
    own, vocabulary = mine.get_vocab(), theirs.get_vocab()
    where = ""
    if own != vocabulary:
        changed = sorted(token for token, number in vocabulary.items() if own.get(token) != number)
        where = repr(changed[0] if changed else sorted(set(own) - set(vocabulary))[0])
    elif mine.backend_tokenizer.to_str() != theirs.backend_tokenizer.to_str():
        where = "merges, or how text is cut up"
    if where:
        raise OmniFP4Error(
            f"{model.location} and {reference.location} are no pair: their tokenizers differ, first in {where}",
            hint="copy the reference's tokenizer files, or name the checkpoint that the model was made from",
        )


def check_memory(
    checkpoint: Checkpoint, device: torch.device, *, speech: bool, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Refuse a checkpoint that cannot be loaded whole.

    Raises:
        OmniFP4Error: naming the way that needs no such memory.
    """
    if fits(checkpoint, device, speech=speech, dtype=dtype):
        return
    needed, free = whole_bytes(checkpoint, speech=speech, dtype=dtype), free_bytes(device)
    less = (
        ", --no-speech leaves the talker out" if speech and fits(checkpoint, device, speech=False, dtype=dtype) else ""
    )
    raise OmniFP4Error(
        f"{checkpoint.location}: its weights take {needed / 1e9:.1f} GB and {device} has {(free or 0) / 1e9:.1f} GB free",
        hint=f"--segmented runs it layer by layer from disk{less}",
    )


def fits(checkpoint: Checkpoint, device: torch.device, *, speech: bool, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether `check_memory` would pass."""
    free = free_bytes(device)
    return free is None or whole_bytes(checkpoint, speech=speech, dtype=dtype) * WEIGHT_ROOM <= free


def whole_bytes(checkpoint: Checkpoint, *, speech: bool, dtype: torch.dtype) -> int:
    """Bytes in memory of the weights that a load reads; wide ones take `dtype`."""
    return sum(
        entry.parameters * dtype.itemsize if entry.dtype in WIDE_DTYPES else entry.nbytes
        for name, entry in checkpoint.tensors.items()
        if speech or not name.startswith(SPEECH_PARTS)
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    for key in sorted((set(one) | set(other)) - IRRELEVANT):
        place = f"{path}.{key}" if path else key
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(mine, theirs, place)
        elif mine != theirs:
            yield place, _short(mine), _short(theirs)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
