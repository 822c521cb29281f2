"""The tensors of a packed model under their names on disk, so that saving gives back the checkpoint that was loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from omnifp4.checkpoint.dialects import CodedLinear, LinearEntries
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.runtime.coded import SchemeExperts, SchemeLinear
from omnifp4.runtime.packed import Branch, NVFP4Linear, PackedExperts, PackedModule
from omnifp4.runtime.placement import CodedExpertsPlace, ExpertsPlace, Placement
from omnifp4.runtime.wide_tensors import TORCH_DTYPES


def saved_tensors(
    model: Any, checkpoint: Checkpoint, placement: Placement, conversions: list[Any] | None
) -> dict[str, Tensor]:
    """Every tensor to save, by its name on disk; packed ones share the model's memory.

    Args:
        model: loaded by `NVFP4Quantizer`.
        checkpoint: what it was loaded from.
        placement: of its packed weights.
        conversions: those that Transformers used on the wide tensors while loading.
    """
    packed = {f"{name}." for name, module in model.named_modules() if isinstance(module, PackedModule)}
    wide: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if f"{owner}." not in packed or leaf == "bias":
            wide[name] = value
    wide = remove_tied_weights_from_state_dict(wide, model)
    kept, model._weight_conversions = model._weight_conversions, conversions
    try:
        tensors = dict(revert_weight_conversion(model, wide))
    finally:
        model._weight_conversions = kept
    for place in placement.linears:
        tensors.update(_linear_tensors(model.get_submodule(place.module), place.source))
    for layer in placement.experts:
        tensors.update(_experts_tensors(model.get_submodule(layer.module), layer))
    for item in placement.coded:
        tensors.update(_coded_tensors(model.get_submodule(item.module), item.source))
    for coded in placement.coded_experts:
        tensors.update(_coded_experts_tensors(model.get_submodule(coded.module), coded))
    if placement.cache_scales:
        with CheckpointReader(checkpoint) as reader:
            for entry in placement.cache_scales:
                tensors[entry.name] = _as_stored(torch.from_numpy(reader.read(entry)), entry)
    return tensors


def _linear_tensors(module: NVFP4Linear, source: LinearEntries) -> Iterator[tuple[str, Tensor]]:
    yield from _tensors(source, module.packed, module.block_scale, module.tensor_scale, module.input_scale)
    yield from _branch_tensors(source, module.packed_weight().branch, 0)


def _experts_tensors(module: PackedExperts, place: ExpertsPlace) -> Iterator[tuple[str, Tensor]]:
    inner = module.intermediate_dim
    gate_up_input, down_input = module._buffers.get("gate_up_input_scale"), module._buffers.get("down_input_scale")
    for expert in range(module.num_experts):
        codes, block_scale = module.gate_up_packed[expert], module.gate_up_block_scale[expert]
        for part, (source, rows) in enumerate(
            ((place.gate[expert], slice(None, inner)), (place.up[expert], slice(inner, None)))
        ):
            input_scale = None if gate_up_input is None else gate_up_input[expert, part]
            scale = module.gate_up_tensor_scale[expert]
            yield from _tensors(source, codes[rows], block_scale[rows], scale, input_scale)
            yield from _branch_tensors(source, module.gate_up(expert).branch, part)
        input_scale = None if down_input is None else down_input[expert]
        yield from _tensors(
            place.down[expert],
            module.down_packed[expert],
            module.down_block_scale[expert],
            module.down_tensor_scale[expert],
            input_scale,
        )
        yield from _branch_tensors(place.down[expert], module.down(expert).branch, 0)


def _branch_tensors(source: LinearEntries, branch: Branch | None, part: int) -> Iterator[tuple[str, Tensor]]:
    """Both halves of the branch of one linear, which is `part` of those that stand over each other."""
    if source.branch is not None and branch is not None:
        yield source.branch.up.name, _as_stored(branch.up[part], source.branch.up)
        yield source.branch.down.name, _as_stored(branch.down[part], source.branch.down)


def _coded_tensors(module: SchemeLinear, source: CodedLinear) -> Iterator[tuple[str, Tensor]]:
    yield from _one_coded(source, module.codes, module.scale, module._buffers.get("input_scale"))


def _coded_experts_tensors(module: SchemeExperts, place: CodedExpertsPlace) -> Iterator[tuple[str, Tensor]]:
    gate_up_input, down_input = module._buffers.get("gate_up_input_scale"), module._buffers.get("down_input_scale")
    for expert in range(module.num_experts):
        codes, scale = module.gate_up_codes[expert].chunk(2), module.gate_up_scale[expert].chunk(2)
        for part, source in enumerate((place.gate[expert], place.up[expert])):
            inputs = None if gate_up_input is None else gate_up_input[expert, part]
            yield from _one_coded(source, codes[part], scale[part], inputs)
        inputs = None if down_input is None else down_input[expert]
        yield from _one_coded(place.down[expert], module.down_codes[expert], module.down_scale[expert], inputs)


def _one_coded(
    source: CodedLinear, codes: Tensor, scale: Tensor, input_scale: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    assert source.scale is not None
    yield source.codes.name, _as_stored(codes, source.codes)
    yield source.scale.name, _as_stored(scale, source.scale)
    if source.input_scale is not None and input_scale is not None:
        yield source.input_scale.name, _as_stored(input_scale, source.input_scale)
    if source.shape_note is not None:
        yield source.shape_note.name, torch.tensor(source.shape, dtype=TORCH_DTYPES[source.shape_note.dtype])


def _tensors(
    source: LinearEntries, packed: Tensor, block_scale: Tensor, tensor_scale: Tensor, input_scale: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    pairs = (
        (source.packed, packed),
        (source.block_scale, block_scale),
        (source.tensor_scale, tensor_scale),
        (source.input_scale, input_scale),
    )
    for entry, value in pairs:
        if entry is not None and value is not None:
            yield entry.name, _as_stored(value, entry)


def _as_stored(value: Tensor, entry: TensorEntry) -> Tensor:
    """A tensor of its own storage over the same memory, in the dtype and shape on disk."""
    # Through DLPack, because Transformers copies tensors that are parts of one storage, which would take the memory of
    # all experts once more.
    # One value may stand under two names on disk (gate and up), which safetensors takes only as two tensors.
    alone = value.clone() if value.numel() == 1 else from_dlpack(value.detach().contiguous())
    if value.dtype == torch.uint8:
        alone = alone.view(TORCH_DTYPES[entry.dtype])
    return alone.reshape(entry.shape)
