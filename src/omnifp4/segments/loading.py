"""Brings parts of a checkpoint into the skeleton and takes them out again.

One part is in memory at a time. While it is used, the system is asked to bring the next one's bytes from disk to its page
cache, which it may drop again: so the disk never rests, and the process never holds two parts.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor, nn

from omnifp4.checkpoint.artifact import find_coded, find_linears
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.runtime.coded import scheme_experts, scheme_linear
from omnifp4.runtime.filling import fill
from omnifp4.runtime.options import LoadOptions
from omnifp4.runtime.packed import NVFP4Linear, PackedExperts, PackedModule
from omnifp4.runtime.placement import EXPERT_NAME, Placement, place, rank_of, replace_module
from omnifp4.runtime.progress import LoadProgress
from omnifp4.runtime.scales import read_scales
from omnifp4.runtime.staging import Run, Stager, runs
from omnifp4.runtime.wide_tensors import TORCH_DTYPES
from omnifp4.segments.skeleton import HEAD, Part, Skeleton

MOST_READERS: Final = 8
"""Threads that read one part. A disk wants several requests at once, also where there are few processors."""

ADVISED_BYTES: Final = 128 << 10
"""Asked for at once. Of a longer range Linux reads only as much as a device's read-ahead window, and this is the smallest
that is usual."""


@dataclass(frozen=True, slots=True)
class _Cast:
    """A tensor whose dtype on disk is not that in memory."""

    entry: TensorEntry
    into: Tensor


class PartLoader:
    """Loads parts; close it to end its threads.

    Attributes:
        read_bytes: read so far.
        waited_seconds: that callers of `take` waited for the disk.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        backend: str,
        progress: LoadProgress | None = None,
    ) -> None:
        """`backend` runs packed weights, see `choose_backend`."""
        self._skeleton, self._checkpoint, self._device, self._backend = skeleton, checkpoint, device, backend
        self._progress = progress or LoadProgress()
        self._reader = CheckpointReader(checkpoint)
        self._stager = Stager(self._reader, self._progress)
        self._readers = ThreadPoolExecutor(min(MOST_READERS, 2 * (os.cpu_count() or 1)), "omnifp4-segment-read")
        self._ahead = ThreadPoolExecutor(1, "omnifp4-segment-ahead")
        self._asked: set[str] = set()
        self._closed = threading.Event()
        self._placements: dict[str, Placement] = {}
        self._spare: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}
        self._scratch = threading.local()
        self.read_bytes = 0
        self.waited_seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, what they are reading included, and close the files."""
        self._closed.set()
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def read_ahead(self, part: Part) -> None:
        """Ask the system to bring a part's bytes from disk to its page cache; they take no memory of this process."""
        if part.name not in self._asked and hasattr(os, "posix_fadvise"):
            self._asked.add(part.name)
            # Nobody asks for the outcome: where a file system cannot do it, the reading itself is only slower.
            self._ahead.submit(self._advise, part)

    def take(self, part: Part) -> nn.Module:
        """The part's module with its weights; waits until they are there."""
        began = time.perf_counter()
        self._load(part)
        self.waited_seconds += time.perf_counter() - began
        return part.module

    def _advise(self, part: Part) -> None:
        for shard, begin, end in _ranges(part.entries.values()):
            for first in range(begin, end, ADVISED_BYTES):
                if self._closed.is_set():
                    return
                length = min(ADVISED_BYTES, end - first)
                os.posix_fadvise(self._reader.file_descriptor(shard), first, length, os.POSIX_FADV_WILLNEED)

    def free(self, part: Part, *, keep_memory: bool = False) -> None:
        """Take the weights out of a part; with `keep_memory` the next part of its shape is read into their place."""
        for module in part.module.modules():
            for name, value in module._parameters.items():
                if value is not None and not value.is_meta:
                    self._give_up(value.data, keep_memory)
                    module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
            if isinstance(module, PackedModule):
                for name, buffer in module._buffers.items():
                    if buffer is not None and not buffer.is_meta:
                        self._give_up(buffer, keep_memory)
                        module._buffers[name] = buffer.to("meta")

    def _give_up(self, memory: Tensor, keep: bool) -> None:
        if keep:
            self._spare.setdefault((tuple(memory.shape), memory.dtype), []).append(memory)

    def _memory(self, like: Tensor) -> Tensor:
        """Memory for a tensor: fresh pages cost as much as the reading itself, so what a layer leaves is used again."""
        spare = self._spare.get((tuple(like.shape), like.dtype))
        return spare.pop() if spare else torch.empty_like(like, device=self._device)

    def _load(self, part: Part) -> None:
        placement = self._placements.get(part.name)
        if placement is None and (find_linears(part.entries) or find_coded(part.entries)):
            placement = place(self._skeleton.model, part.entries, self._skeleton.renaming, self._checkpoint.location)
            self._swap(part, placement)
            self._placements[part.name] = placement
        packed = placement.packed_names if placement is not None else frozenset()
        self._load_wide(part, {name: entry for name, entry in part.entries.items() if name not in packed})
        if placement is not None:
            self._load_packed(part, placement)
        # What this part has no use for would stand beside it.
        self._spare.clear()
        self.read_bytes += part.nbytes

    def _swap(self, part: Part, placement: Placement) -> None:
        model = self._skeleton.model
        for linear in placement.linears:
            source = linear.source

            def pack_linear(
                wide: nn.Module,
                reciprocal: bool = source.reciprocal,
                w4a4: bool = source.input_scale is not None,
                rank: int = rank_of(source),
            ) -> nn.Module:
                assert isinstance(wide, nn.Linear)
                return NVFP4Linear(wide, self._backend, reciprocal=reciprocal, input_scale=w4a4, rank=rank)

            part.sources[source.module] = replace_module(model, linear.module, pack_linear)
        for layer in placement.experts:
            first = layer.gate[0]

            def pack_experts(
                wide: nn.Module,
                reciprocal: bool = first.reciprocal,
                w4a4: bool = first.input_scale is not None,
                rank: int = rank_of(first),
            ) -> nn.Module:
                return PackedExperts(wide, self._backend, reciprocal=reciprocal, input_scale=w4a4, rank=rank)

            match = EXPERT_NAME.fullmatch(first.module)
            assert match is not None
            part.sources[match["experts"]] = replace_module(model, layer.module, pack_experts)
        for item in placement.coded:
            made = replace_module(model, item.module, partial(scheme_linear, source=item.source))
            part.sources[item.source.module] = made
        for coded in placement.coded_experts:
            match = EXPERT_NAME.fullmatch(coded.gate[0].module)
            assert match is not None
            made = replace_module(model, coded.module, partial(scheme_experts, source=coded.gate[0]))
            part.sources[match["experts"]] = made
        if part.name == HEAD:
            # The part is the linear layer itself, which has just been replaced.
            part.module = self._skeleton.thinker.lm_head

    def _load_packed(self, part: Part, placement: Placement) -> None:
        for module in part.module.modules():
            if isinstance(module, PackedModule):
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_meta:
                        module._buffers[name] = self._memory(buffer)
        scales = read_scales(self._checkpoint, placement)
        options = LoadOptions(self._backend, self._device, self._progress, self._readers._max_workers, self._checkpoint)
        fill(self._skeleton.model, self._checkpoint, placement, scales, options)

    def _load_wide(self, part: Part, entries: Mapping[str, TensorEntry]) -> None:
        into = {id(value): self._memory(value) for _, value in _parameters(part.module)}
        # In the order of the file, which disks like.
        work = sorted(self._wide_work(part, entries, into), key=_place_on_disk)
        for _ in self._readers.map(self._read, work):
            pass
        for module in part.module.modules():
            for name, value in module._parameters.items():
                if value is not None and value.is_meta:
                    module._parameters[name] = nn.Parameter(into[id(value)], requires_grad=False)

    def _wide_work(
        self, part: Part, entries: Mapping[str, TensorEntry], into: Mapping[int, Tensor]
    ) -> Iterator[Run | _Cast]:
        """What is to be read, every parameter exactly once."""
        subject = self._checkpoint.location
        state = dict(self._skeleton.model.named_parameters(remove_duplicate=False))
        pieces: dict[str, list[tuple[int, TensorEntry]]] = {}
        for name, entry in entries.items():
            target = self._skeleton.renaming.target(name)
            value = state.get(target)
            if value is None or id(value) not in into:
                raise CheckpointError(f"{subject}/{entry.shard}: tensor {name!r} has no place in the {part.name}")
            place_in = 0
            if entry.shape != tuple(value.shape):
                place_in = _place_of_expert(name, entry, value, subject)
                match = EXPERT_NAME.fullmatch(name.removesuffix(".weight"))
                owner = match["experts"] if match else ""
            else:
                fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
                owner = name.rpartition(".")[0] if fused else name.removesuffix(".weight")
            pieces.setdefault(target, []).append((place_in, entry))
            module = self._skeleton.model.get_submodule(target.rpartition(".")[0])
            # The inputs of a linear are shown once: under its name, not under that of its bias too.
            if (isinstance(module, nn.Linear) and name.endswith(".weight")) or owner.endswith(".experts"):
                part.sources[owner] = module
        for name, value in _parameters(part.module):
            target = next((key for key in pieces if state[key] is value), "")
            found = sorted(pieces.get(target, ()), key=lambda piece: piece[0])
            elements = sum(entry.parameters for _, entry in found)
            if elements != value.numel() or len({begin for begin, _ in found}) != len(found):
                raise CheckpointError(
                    f"{subject}: {name!r} of the {part.name} has {value.numel():,} values and the checkpoint {elements:,}"
                )
            yield from _reads([entry for _, entry in found], into[id(value)])

    def _read(self, work: Run | _Cast) -> None:
        if isinstance(work, Run):
            self._stager.read(work)
            return
        raw: Tensor | None = getattr(self._scratch, "raw", None)
        if raw is None or raw.numel() < work.entry.nbytes:
            raw = self._scratch.raw = torch.empty(work.entry.nbytes, dtype=torch.uint8)
        raw = raw[: work.entry.nbytes]
        self._stager.read(Run((work.entry,), raw))
        work.into.copy_(raw.view(TORCH_DTYPES[work.entry.dtype]).view(work.into.shape))


def _place_on_disk(work: Run | _Cast) -> tuple[str, int]:
    entry = work.entries[0] if isinstance(work, Run) else work.entry
    return entry.shard, entry.begin


def _ranges(entries: Iterable[TensorEntry]) -> Iterator[tuple[str, int, int]]:
    """Tensors as ranges of bytes, in the order of the files; neighbours are one."""
    shard, begin, end = "", 0, 0
    for entry in sorted(entries, key=lambda entry: (entry.shard, entry.begin)):
        if (entry.shard, entry.begin) == (shard, end):
            end = entry.end
            continue
        if end > begin:
            yield shard, begin, end
        shard, begin, end = entry.shard, entry.begin, entry.end
    if end > begin:
        yield shard, begin, end


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Wide parameters that have no memory yet."""
    for name, value in module.named_parameters():
        if value.is_meta:
            yield name, value


def _place_of_expert(name: str, entry: TensorEntry, value: Tensor, subject: str) -> int:
    """Where an expert's projection begins in the fused tensor of its layer, in elements."""
    match = EXPERT_NAME.fullmatch(name.removesuffix(".weight"))
    rows = value.shape[1] // (1 if match is not None and match["part"] == "down_proj" else 2) if value.ndim == 3 else 0
    if match is None or entry.shape != (rows, value.shape[-1]) or int(match["number"]) >= value.shape[0]:
        raise CheckpointError(
            f"{subject}/{entry.shard}: tensor {name!r} is {list(entry.shape)} where the model has {list(value.shape)}"
        )
    second = rows * value.shape[2] if match["part"] == "up_proj" else 0
    return int(match["number"]) * value.shape[1] * value.shape[2] + second


def _reads(entries: list[TensorEntry], into: Tensor) -> Iterator[Run | _Cast]:
    """Reads of tensors that fill `into`, one behind the other."""
    if all(TORCH_DTYPES.get(entry.dtype) == into.dtype for entry in entries):
        yield from runs(entries, into)
        return
    begin = 0
    for entry in entries:
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"tensor {entry.name!r} of {entry.shard} is {entry.dtype}, which torch does not have")
        yield _Cast(entry, into.view(-1)[begin : begin + entry.parameters])
        begin += entry.parameters
