"""Streams packed weights from disk into the buffers of packed modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from omnifp4.checkpoint.dialects import CodedLinear, LinearEntries
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.formats.mxfp4 import E8M0_NAN
from omnifp4.formats.scheme import Scheme
from omnifp4.runtime.coded import SchemeExperts, SchemeLinear, SchemeModule
from omnifp4.runtime.options import LoadOptions
from omnifp4.runtime.packed import NVFP4Linear, PackedExperts, PackedModule
from omnifp4.runtime.placement import CodedExpertsPlace, CodedPlace, ExpertsPlace, LinearPlace, Placement
from omnifp4.runtime.scales import Scales
from omnifp4.runtime.staging import Run, Stager, runs, total_bytes


def fill(model: nn.Module, checkpoint: Checkpoint, placement: Placement, scales: Scales, options: LoadOptions) -> None:
    """Fill every packed module of `model`.

    Raises:
        CheckpointError: a file cannot be read, or a block scale is NaN.
    """
    _materialize(model, placement, options.device)
    work = list(_work(model, placement, scales))
    options.progress.expect(total_bytes(work))
    with (
        CheckpointReader(checkpoint) as reader,
        ThreadPoolExecutor(options.threads, "omnifp4-read") as pool,
        options.progress.running(),
    ):
        try:
            for _ in pool.map(Stager(reader, options.progress).read, work):
                pass
        except BaseException:
            # After a failure or an interrupt, gigabytes need not be read before it is told.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _check_block_scales(model, placement, checkpoint.location)
    _check_coded(model, placement, checkpoint.location)


def _modules(model: nn.Module, placement: Placement) -> Iterator[tuple[Any, Any]]:
    places: list[LinearPlace | ExpertsPlace | CodedPlace | CodedExpertsPlace] = [
        *placement.linears,
        *placement.experts,
        *placement.coded,
        *placement.coded_experts,
    ]
    for place in places:
        yield place, model.get_submodule(place.module)


def _materialize(model: nn.Module, placement: Placement, device: torch.device | None) -> None:
    """Give buffers their memory where Transformers has not: on the device asked for."""
    for _, module in _modules(model, placement):
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta or (device is not None and buffer.device != device):
                module._buffers[name] = torch.empty_like(buffer, device=device or "cpu")


def _work(model: nn.Module, placement: Placement, scales: Scales) -> Iterator[Run]:
    """What is to be read, module by module; scalars are set at once."""
    for place, module in _modules(model, placement):
        if isinstance(module, NVFP4Linear):
            yield from _linear_runs(module, place.source, scales)
        elif isinstance(module, SchemeLinear):
            yield from _coded_runs(module, "", [place.source])
        elif isinstance(module, SchemeExperts):
            gate_up = [source for pair in zip(place.gate, place.up, strict=True) for source in pair]
            yield from _coded_runs(module, "gate_up_", gate_up)
            yield from _coded_runs(module, "down_", place.down)
        else:
            assert isinstance(module, PackedExperts)
            yield from _experts_runs(module, place, scales)


def _linear_runs(module: NVFP4Linear, source: LinearEntries, scales: Scales) -> Iterator[Run]:
    assert source.tensor_scale is not None
    module.tensor_scale.fill_(scales[source.tensor_scale.name])
    if source.input_scale is not None:
        assert module.input_scale is not None
        module.input_scale.fill_(scales[source.input_scale.name])
    yield from runs([source.packed], module.packed)
    yield from runs([_block_scale(source)], module.block_scale)
    yield from _branch_runs(module, "branch", [source])


def _experts_runs(module: PackedExperts, place: ExpertsPlace, scales: Scales) -> Iterator[Run]:
    _set(module.gate_up_tensor_scale, _values(place.gate, "tensor_scale", scales))
    _set(module.down_tensor_scale, _values(place.down, "tensor_scale", scales))
    if place.gate[0].input_scale is not None:
        gate, up = (_values(part, "input_scale", scales) for part in (place.gate, place.up))
        _set(module._buffers["gate_up_input_scale"], [list(pair) for pair in zip(gate, up, strict=True)])
        _set(module._buffers["down_input_scale"], _values(place.down, "input_scale", scales))
    gate_up = [source for pair in zip(place.gate, place.up, strict=True) for source in pair]
    yield from runs([source.packed for source in gate_up], module.gate_up_packed)
    yield from runs([_block_scale(source) for source in gate_up], module.gate_up_block_scale)
    yield from runs([source.packed for source in place.down], module.down_packed)
    yield from runs([_block_scale(source) for source in place.down], module.down_block_scale)
    yield from _branch_runs(module, "gate_up_branch", gate_up)
    yield from _branch_runs(module, "down_branch", place.down)


def _branch_runs(module: PackedModule, name: str, sources: Sequence[LinearEntries]) -> Iterator[Run]:
    for half in ("up", "down"):
        buffer = module._buffers.get(f"{name}_{half}")
        if buffer is not None:
            yield from runs([getattr(source.branch, half) for source in sources], buffer)


def _coded_runs(module: SchemeModule, name: str, sources: Sequence[CodedLinear]) -> Iterator[Run]:
    for part, entries in (
        ("codes", [source.codes for source in sources]),
        ("scale", [source.scale for source in sources if source.scale is not None]),
        ("input_scale", [source.input_scale for source in sources if source.input_scale is not None]),
    ):
        buffer = module._buffers.get(f"{name}{part}")
        if buffer is not None:
            yield from runs(entries, buffer)


def _block_scale(source: LinearEntries) -> TensorEntry:
    assert source.block_scale is not None
    return source.block_scale


def _values(sources: Iterable[LinearEntries], which: str, scales: Scales) -> list[float]:
    return [scales[getattr(source, which).name] for source in sources]


def _set(buffer: Tensor | None, values: list[Any]) -> None:
    assert buffer is not None
    buffer.copy_(torch.tensor(values, dtype=torch.float32))


def _check_block_scales(model: nn.Module, placement: Placement, subject: str) -> None:
    """A NaN block scale makes everything after it NaN."""
    for place, module in _modules(model, placement):
        for name, buffer in module.named_buffers(recurse=False):
            # 0x7F and 0xFF are the NaNs of E4M3.
            if name.endswith("block_scale") and bool(((buffer & 0x7F) == 0x7F).any()):
                raise CheckpointError(
                    f"{subject}: block scales of {place.module!r} are NaN", hint=f"omnifp4 verify {subject} shows where"
                )


def _check_coded(model: nn.Module, placement: Placement, subject: str) -> None:
    """No scale that no product survives, and no FP8 code that is not a number."""
    for place, module in _modules(model, placement):
        if not isinstance(module, SchemeModule):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            wrong = ""
            if name.endswith("codes") and module.form.scheme is Scheme.FP8:
                wrong = "codes" if bool(((buffer & 0x7F) == 0x7F).any()) else ""
            elif name.endswith("scale") and buffer.dtype == torch.uint8:
                wrong = "scales" if bool((buffer == E8M0_NAN).any()) else ""
            elif name.endswith("scale"):
                values = buffer.float()
                wrong = "" if bool(((values > 0) & values.isfinite()).all()) else "scales"
            if wrong:
                raise CheckpointError(
                    f"{subject}: {wrong} of {place.module!r} are no positive finite numbers"
                    if wrong == "scales"
                    else f"{subject}: {wrong} of {place.module!r} are NaN",
                    hint=f"omnifp4 verify {subject} shows where",
                )
