"""Whether two checkpoints can be compared, and whether they fit into memory: told before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from omnifp4.chat.loading import open_processor
from omnifp4.checkpoint.folder import Checkpoint, open_checkpoint
from omnifp4.errors import CheckpointError, ModelError, OmniFP4Error
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
    """

    model: Checkpoint
    reference: Checkpoint
    processor: Any
    config: Any
    speaks: bool


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
    if difference := next(_differences(opened.config, against.config, ""), None):
        key, mine, theirs = difference
        raise OmniFP4Error(
            f"{opened.location} and {against.location} are no pair: {key} is {mine} in the one and {theirs} in the other",
            hint="--against takes the checkpoint that the model was made from",
        )
    import transformers

    processor, other = open_processor(against.location), open_processor(opened.location)
    vocabulary, own = processor.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if vocabulary != own:
        changed = sorted(token for token, number in vocabulary.items() if own.get(token) != number)
        first = changed[0] if changed else sorted(set(own) - set(vocabulary))[0]
        raise OmniFP4Error(
            f"{opened.location} and {against.location} are no pair: their tokenizers differ, first at {first!r}",
            hint="copy the reference's tokenizer files, or name the checkpoint that the model was made from",
        )
    speaks = all(any(name.startswith("talker.") for name in one.tensors) for one in (opened, against))
    config = transformers.AutoConfig.from_pretrained(against.location)
    return Pair(opened, against, processor, config, speaks)


def check_memory(checkpoint: Checkpoint, device: torch.device, *, speech: bool) -> None:
    """Refuse a checkpoint that cannot be loaded whole.

    Raises:
        OmniFP4Error: naming the way that needs no such memory.
    """
    needed, free = whole_bytes(checkpoint, speech=speech), free_bytes(device)
    if free is not None and needed * WEIGHT_ROOM > free:
        raise OmniFP4Error(
            f"{checkpoint.location}: its weights take {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free",
            hint="--segmented runs it layer by layer from disk",
        )


def fits(checkpoint: Checkpoint, device: torch.device, *, speech: bool) -> bool:
    """Whether `check_memory` would pass."""
    free = free_bytes(device)
    return free is None or whole_bytes(checkpoint, speech=speech) * WEIGHT_ROOM <= free


def whole_bytes(checkpoint: Checkpoint, *, speech: bool) -> int:
    """Bytes of the weights that a load reads."""
    return sum(e.nbytes for name, e in checkpoint.tensors.items() if speech or not name.startswith(SPEECH_PARTS))


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


def check_weights(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose files are not here."""
    if checkpoint.folder is None:
        raise CheckpointError(f"{checkpoint.location}: only its headers are here", hint="download it first")
