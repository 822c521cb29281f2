"""Streams packed weights from disk into the buffers of packed modules.

In host memory the bytes are read to where they stay. For a GPU they go through a few pinned buffers of fixed size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from omnifp4.checkpoint.dialects import LinearEntries
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.runtime.options import LoadOptions
from omnifp4.runtime.packed import NVFP4Linear, PackedExperts
from omnifp4.runtime.placement import ExpertsPlace, LinearPlace, Placement
from omnifp4.runtime.scales import Scales

STAGING_BYTES: Final = 32 << 20
"""Pinned memory of one worker; bytes for a GPU go through it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A whole tensor on disk and the contiguous part of a buffer that it fills; both have the same bytes."""

    entry: TensorEntry
    into: Tensor


def fill(model: nn.Module, checkpoint: Checkpoint, placement: Placement, scales: Scales, options: LoadOptions) -> None:
    """Fill every packed module of `model`.

    Raises:
        CheckpointError: a file cannot be read, or a block scale is NaN.
    """
    _materialize(model, placement, options.device)
    work = list(_work(model, placement, scales))
    options.progress.expect(sum(piece.entry.nbytes for pieces in work for piece in pieces))
    with (
        CheckpointReader(checkpoint) as reader,
        ThreadPoolExecutor(options.threads, "omnifp4-read") as pool,
        options.progress.running(),
    ):
        memory = threading.local()
        for _ in pool.map(lambda pieces: _fill_pieces(reader, pieces, options, memory), work):
            pass
    _check_block_scales(model, placement, checkpoint.location)


def _modules(model: nn.Module, placement: Placement) -> Iterator[tuple[Any, Any]]:
    places: list[LinearPlace | ExpertsPlace] = [*placement.linears, *placement.experts]
    for place in places:
        yield place, model.get_submodule(place.module)


def _materialize(model: nn.Module, placement: Placement, device: torch.device | None) -> None:
    """Give buffers their memory where Transformers has not: on the device asked for."""
    for _, module in _modules(model, placement):
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta or (device is not None and buffer.device != device):
                module._buffers[name] = torch.empty_like(buffer, device=device or "cpu")


def _work(model: nn.Module, placement: Placement, scales: Scales) -> Iterator[list[Piece]]:
    """Pieces of one module each, in the order of the files as far as modules allow; scalars are set at once."""
    for place, module in _modules(model, placement):
        if isinstance(module, NVFP4Linear):
            yield _linear_pieces(module, place.source, scales)
        else:
            assert isinstance(module, PackedExperts)
            yield from _experts_pieces(module, place, scales)


def _linear_pieces(module: NVFP4Linear, source: LinearEntries, scales: Scales) -> list[Piece]:
    assert source.tensor_scale is not None and source.block_scale is not None
    module.tensor_scale.fill_(scales[source.tensor_scale.name])
    if source.input_scale is not None:
        assert module.input_scale is not None
        module.input_scale.fill_(scales[source.input_scale.name])
    return [Piece(source.packed, module.packed), Piece(source.block_scale, module.block_scale)]


def _experts_pieces(module: PackedExperts, place: ExpertsPlace, scales: Scales) -> Iterator[list[Piece]]:
    _set(module.gate_up_tensor_scale, _values(place.gate, "tensor_scale", scales))
    _set(module.down_tensor_scale, _values(place.down, "tensor_scale", scales))
    if place.gate[0].input_scale is not None:
        gate, up = (_values(part, "input_scale", scales) for part in (place.gate, place.up))
        _set(module._buffers["gate_up_input_scale"], [list(pair) for pair in zip(gate, up, strict=True)])
        _set(module._buffers["down_input_scale"], _values(place.down, "input_scale", scales))
    inner = module.intermediate_dim
    for expert, (gate_source, up_source, down_source) in enumerate(zip(place.gate, place.up, place.down, strict=True)):
        codes, block_scale = module.gate_up_packed[expert], module.gate_up_block_scale[expert]
        assert gate_source.block_scale and up_source.block_scale and down_source.block_scale
        yield [
            Piece(gate_source.packed, codes[:inner]),
            Piece(gate_source.block_scale, block_scale[:inner]),
            Piece(up_source.packed, codes[inner:]),
            Piece(up_source.block_scale, block_scale[inner:]),
            Piece(down_source.packed, module.down_packed[expert]),
            Piece(down_source.block_scale, module.down_block_scale[expert]),
        ]


def _values(sources: Iterable[LinearEntries], which: str, scales: Scales) -> list[float]:
    return [scales[getattr(source, which).name] for source in sources]


def _set(buffer: Tensor | None, values: list[Any]) -> None:
    assert buffer is not None
    buffer.copy_(torch.tensor(values, dtype=torch.float32))


def _fill_pieces(reader: CheckpointReader, pieces: list[Piece], options: LoadOptions, memory: threading.local) -> None:
    folder = reader.checkpoint.location
    for piece in pieces:
        with options.progress.reading(f"{folder}/{piece.entry.shard}", piece.entry.name, piece.entry.nbytes):
            if piece.into.device.type == "cpu":
                reader.read_into(piece.entry, piece.into.view(-1).numpy())
            else:
                _through_staging(reader, piece, memory)


def _through_staging(reader: CheckpointReader, piece: Piece, memory: threading.local) -> None:
    staging = getattr(memory, "staging", None)
    if staging is None:
        staging = memory.staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
    into = piece.into.view(-1)
    for begin in range(0, into.numel(), STAGING_BYTES):
        part = into[begin : begin + STAGING_BYTES]
        window = staging[: part.numel()]
        reader.read_into(piece.entry, window.numpy(), begin)
        # The window is written again at once, so the copy must be over.
        part.copy_(window)


def _check_block_scales(model: nn.Module, placement: Placement, subject: str) -> None:
    """A NaN block scale makes everything after it NaN."""
    for place, module in _modules(model, placement):
        for name, buffer in module.named_buffers(recurse=False):
            # 0x7F and 0xFF are the NaNs of E4M3.
            if name.endswith("block_scale") and bool(((buffer & 0x7F) == 0x7F).any()):
                raise CheckpointError(
                    f"{subject}: block scales of {place.module!r} are NaN", hint=f"omnifp4 verify {subject} shows where"
                )
