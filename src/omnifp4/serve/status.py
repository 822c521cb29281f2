"""What the chat page shows of the server: model, engine, memory, limits, and which weights are FP4."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from omnifp4.chat.meter import process_bytes
from omnifp4.chat.omni_chat import OmniChat
from omnifp4.checkpoint.artifact import find_coded, find_linears
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.receipt.base import package_version
from omnifp4.serve.scheduler import Scheduler
from omnifp4.serve.settings import Settings

PARTS: Final = (
    ("hearing", ("thinker.audio_tower.",)),
    ("seeing", ("thinker.visual.",)),
    ("thinking: experts", ("thinker.model.",)),
    ("thinking: the rest", ("thinker.",)),
    ("speaking: codes", ("talker.",)),
    ("speaking: sound", ("code2wav.",)),
)
"""Parts as a listener knows them, by the names of their tensors; the first that fits counts."""


@dataclass(frozen=True, slots=True)
class PartWeights:
    """Weights of one part of the model, in parameters and bytes on disk, which is also what they take in memory."""

    part: str
    parameters: int
    fp4_parameters: int
    nbytes: int


def weights_of(folder: Path) -> tuple[PartWeights, ...]:
    """Which weights of a checkpoint are FP4, from its headers.

    Raises:
        CheckpointError: it cannot be read.
    """
    checkpoint = open_checkpoint(folder)
    linears = {module: one for module, one in find_linears(checkpoint.tensors).items() if one.packed.dtype == "U8"}
    codes = {one.packed.name for one in linears.values()}
    scales = {
        entry.name
        for one in linears.values()
        for entry in (one.block_scale, one.tensor_scale, one.input_scale)
        if entry is not None
    }
    weights = {one.packed.name: 2 * one.packed.parameters for one in linears.values()}
    for other in find_coded(checkpoint.tensors).values():
        weights[other.codes.name] = prod(other.shape)
        codes |= {other.codes.name} if other.scheme.code_bits == 4 else set()
        scales |= {entry.name for entry in other.entries} - {other.codes.name}
    sums: dict[str, list[int]] = {part: [0, 0, 0] for part, _ in PARTS}
    for name, entry in checkpoint.tensors.items():
        part = _part_of(name)
        if part is None:
            continue
        count = 0 if name in scales else weights.get(name, entry.parameters)
        sums[part][0] += count
        sums[part][1] += count if name in codes else 0
        sums[part][2] += entry.nbytes
    return tuple(PartWeights(part, *numbers) for part, numbers in sums.items() if numbers[0])


def _part_of(name: str) -> str | None:
    for part, prefixes in PARTS:
        if name.startswith(prefixes) and (part != "thinking: experts" or ".experts." in name):
            return part
    return None


class Status:
    """Answers ``/v1/omnifp4/status``."""

    def __init__(self, chat: OmniChat, scheduler: Scheduler, settings: Settings, folder: Path | None) -> None:
        """`folder`: the checkpoint's; None: it is not known, and neither are its weights' formats."""
        self._chat = chat
        self._scheduler = scheduler
        self._settings = settings
        self._weights = weights_of(folder) if folder is not None else ()

    def read(self) -> Mapping[str, Any]:
        """The state of now."""
        limits = self._settings.limits
        chat = self._chat
        return {
            "version": package_version(),
            "model": self._settings.name,
            "engine": {"name": chat.engine.name, "reason": chat.engine.reason},
            "device": _device_name(chat.device),
            "memory": memory_of(chat.device),
            "context_tokens": chat.context_tokens,
            "most_sequences": self._scheduler.most_sequences,
            "running": self._scheduler.running,
            "waiting": self._scheduler.waiting,
            "voices": list(chat.speakers),
            "weights": [
                {
                    "part": one.part,
                    "parameters": one.parameters,
                    "fp4_parameters": one.fp4_parameters,
                    "bytes": one.nbytes,
                }
                for one in self._weights
            ],
            "limits": {
                "body_bytes": limits.body_bytes,
                "new_tokens": limits.new_tokens,
                "audio_seconds": limits.audio_seconds,
                "video_seconds": limits.video_seconds,
                "media": limits.media,
            },
        }


def memory_of(device: Any) -> dict[str, Any]:
    """Bytes in use now: on the GPU what PyTorch has allocated, elsewhere what the process holds; and of how many."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return {"where": "gpu", "bytes": torch.cuda.memory_allocated(device), "free": free, "total": total}
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"where": "process", "bytes": process_bytes(), "free": None, "total": total}


def _device_name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    return "CPU"
