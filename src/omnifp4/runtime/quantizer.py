"""The quantizer that Transformers calls while it loads and saves an NVFP4 checkpoint.

Its part of a load: check everything from headers, put packed modules in place of wide ones while the model has no
memory yet, keep the packed tensors from Transformers' own loader, and fill them when the rest is loaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from omnifp4.checkpoint.dialects import Activations
from omnifp4.checkpoint.folder import Checkpoint, open_checkpoint
from omnifp4.errors import CheckpointError, OmniFP4Error
from omnifp4.models import KNOWN_MODEL_TYPES
from omnifp4.runtime.claim import NVFP4CheckpointConfig, check_algorithm, rounds_inputs
from omnifp4.runtime.coded import scheme_experts, scheme_linear
from omnifp4.runtime.filling import fill
from omnifp4.runtime.names import Renaming
from omnifp4.runtime.options import current_options
from omnifp4.runtime.packed import NVFP4Linear, PackedExperts, PackedModule
from omnifp4.runtime.placement import Placement, place, rank_of, replace_module
from omnifp4.runtime.saving import saved_tensors
from omnifp4.runtime.scales import Scales, read_scales

logger = logging.getLogger("omnifp4")

HIDDEN_NAME = "omnifp4.packed"
"""What packed tensors are called when Transformers' loader meets them."""

_told: set[str] = set()


def tell_once(message: str) -> None:
    """Log a warning, once in the life of the process."""
    if message not in _told:
        _told.add(message)
        logger.warning(message)


class HidePacked(WeightRenaming):
    """A renaming that gives all packed tensors one name that no model has, so that they are left alone.

    Wide tensors under names that Transformers does not know get those that it knows.
    """

    def __init__(self, names: frozenset[str], aliases: Mapping[str, str]) -> None:
        super().__init__(source_patterns="^omnifp4-matches-nothing$", target_patterns=HIDDEN_NAME)
        self._names, self._aliases = names, aliases

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """See `WeightRenaming.rename_source_key`."""
        return (HIDDEN_NAME if source_key in self._names else self._aliases.get(source_key, source_key)), None


class NVFP4Quantizer(HfQuantizer):
    """Loads ModelOpt, compressed-tensors and AutoRound checkpoints whose weights are NVFP4."""

    requires_calibration = True
    quantization_config: NVFP4CheckpointConfig

    def __init__(
        self, quantization_config: NVFP4CheckpointConfig, *, stock: tuple[Any, Any] | None = None, **kwargs: Any
    ) -> None:
        """`stock` is Transformers' own config class and quantizer of this method, for model types unknown here."""
        super().__init__(quantization_config, **kwargs)
        self._stock = stock
        self._device_map: Any = None
        self._checkpoint: Checkpoint | None = None
        self._placement: Placement | None = None
        self._conversions: list[Any] | None = None
        self._scales: Scales = {}
        self._aliases: Mapping[str, str] = {}
        self._disk_names: Mapping[str, str] = {}
        self._unexpected: Any = None
        self._compute_dtype: torch.dtype | None = None

    # Hooks in the order in which Transformers calls them.

    def update_device_map(self, device_map: Any) -> Any:
        """See `HfQuantizer.update_device_map`."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise OmniFP4Error("device_map: packed weights cannot be offloaded to disk", hint="use a device or 'auto'")
        device = current_options().device
        if device_map is None and device is not None and device.type != "cpu":
            # Here no accelerate is needed for it, unlike in an argument of `from_pretrained`.
            device_map = {"": device}
        self._device_map = device_map
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """Called first with the model's config by Transformers 5.21 and later."""
        return self._see_config(config)

    def update_tp_plan(self, config: Any) -> Any:
        """Called first with the model's config by Transformers up to 5.20."""
        return self._see_config(config)

    def _see_config(self, config: Any) -> Any:
        if self._stock is not None and config.model_type not in KNOWN_MODEL_TYPES:
            stock_config, stock_quantizer = self._stock
            device_map = self._device_map
            config.quantization_config = stock_config.from_dict(self.quantization_config.raw)
            self.__dict__.clear()
            self.__class__ = stock_quantizer
            stock_quantizer.__init__(self, config.quantization_config, pre_quantized=True)
            stock_quantizer.validate_environment(self, device_map=device_map, weights_only=True)
            return config
        check_algorithm(self.quantization_config.raw)
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See `HfQuantizer.update_dtype`: what is not packed, and what packed weights are unpacked to."""
        check_dtype(dtype)
        self._compute_dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        checkpoint = current_options().checkpoint or _open(checkpoint_files)
        renaming = Renaming(model)
        placement = place(model, checkpoint.tensors, renaming, checkpoint.location)
        renaming.check_wide(checkpoint.tensors, placement.packed_names, placement.weights, checkpoint.location)
        self._aliases = renaming.aliases
        self._disk_names = {alias: name for name, alias in self._aliases.items()}
        self._scales = read_scales(checkpoint, placement)
        put_packed(model, placement, current_options().backend)
        self._unexpected = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(self._unexpected or ()), f"^{re.escape(HIDDEN_NAME)}$"}
        self._checkpoint, self._placement = checkpoint, placement
        if self.quantization_config.claim.activations is Activations.FP4:
            tell_once("this checkpoint is W4A4; it runs as W4A16 here: weights in FP4, activations in BF16")
        if rounds_inputs(self.quantization_config.raw):
            tell_once("this checkpoint says that inputs of some layers are 8-bit; they stay wide here")
        if placement.cache_scales:
            tell_once("this checkpoint has scales for an FP8 KV cache; the cache stays wide here")
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """See `HfQuantizer.update_weight_conversions`."""
        assert self._placement is not None
        return [HidePacked(self._placement.packed_names, self._aliases), *weight_conversions]

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """See `HfQuantizer.get_new_dtype` (Transformers 5.21 and later): wide tensors are cast as in any model."""
        is_float = (
            param.get_dtype().startswith(("F", "BF")) if hasattr(param, "get_dtype") else param.is_floating_point()
        )
        return dtype if is_float else None

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._checkpoint is not None and self._placement is not None
        # Transformers up to 5.20 leaves renamed tensors in the checkpoint's dtype.
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16) and self._compute_dtype == torch.float32:
                parameter.data = parameter.data.to(torch.float32)
        fill(model, self._checkpoint, self._placement, self._scales, current_options())
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.finish_loading()
        model._keys_to_ignore_on_load_unexpected = self._unexpected
        used = getattr(model, "_weight_conversions", None) or []
        self._conversions = [entry for entry in used if not isinstance(entry, HidePacked)]
        # `get_state_dict_and_metadata` gives names as they are on disk.
        model._weight_conversions = []
        for name, part in model.named_modules():
            if name and isinstance(part, PreTrainedModel) and any(isinstance(m, PackedModule) for m in part.modules()):
                # Else saving the part alone would write packed weights under names that nothing reads.
                part.__dict__["hf_quantizer"] = PartOfPacked(self.quantization_config)
        mend_talker(model)
        return model

    # Saving.

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """See `HfQuantizer.get_state_dict_and_metadata`."""
        assert self._checkpoint is not None and self._placement is not None
        tensors = saved_tensors(model, self._checkpoint, self._placement, self._conversions)
        return {self._name_on_disk(name, model): value for name, value in tensors.items()}, {}

    def _name_on_disk(self, name: str, model: Any) -> str:
        """The name under which a tensor was read, where Transformers' way back leads to another.

        Up to 5.20 it loses the prefix of a part that was loaded from a whole checkpoint.
        """
        assert self._checkpoint is not None
        prefix = f"{model.base_model_prefix}."
        candidates = (name, self._disk_names.get(name, name), prefix + name, name.removeprefix(prefix))
        return next((one for one in candidates if one in self._checkpoint.tensors), name)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """See `HfQuantizer.is_serializable`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """See `HfQuantizer.is_trainable`."""
        return False


def put_packed(model: Any, placement: Placement, backend: str) -> None:
    """Put packed modules, with no memory yet, in place of the wide ones of a model on the meta device.

    Args:
        model: with its wide modules.
        placement: which of them, and what they are on disk.
        backend: what runs them, as `choose_backend` takes it.
    """
    for linear in placement.linears:
        source = linear.source

        def pack_linear(wide: nn.Module, source: Any = source) -> nn.Module:
            assert isinstance(wide, nn.Linear)
            w4a4, rank = source.input_scale is not None, rank_of(source)
            return NVFP4Linear(wide, backend, reciprocal=source.reciprocal, input_scale=w4a4, rank=rank)

        replace_module(model, linear.module, pack_linear)
    for layer in placement.experts:
        first = layer.gate[0]

        def pack_experts(wide: nn.Module, first: Any = first) -> nn.Module:
            w4a4, rank = first.input_scale is not None, rank_of(first)
            return PackedExperts(wide, backend, reciprocal=first.reciprocal, input_scale=w4a4, rank=rank)

        replace_module(model, layer.module, pack_experts)
        _keep_experts(model, layer.module)
    for item in placement.coded:
        replace_module(model, item.module, partial(scheme_linear, source=item.source))
    for coded in placement.coded_experts:
        replace_module(model, coded.module, partial(scheme_experts, source=coded.gate[0]))
        _keep_experts(model, coded.module)


def _keep_experts(model: Any, module: str) -> None:
    """Transformers initializes experts from the module that holds them, by names that packed ones lack."""
    model.get_submodule(module.rpartition(".")[0])._is_hf_initialized = True


class PartOfPacked(HfQuantizer):
    """Stands in a part of a packed model, which cannot be saved alone."""

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """See `HfQuantizer.is_serializable`."""
        raise OmniFP4Error(
            "a part of a packed model cannot be saved alone",
            hint="save the whole model; Transformers' class of the part loads from it",
        )

    @property
    def is_trainable(self) -> bool:
        """See `HfQuantizer.is_trainable`."""
        return False


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a compute dtype that packed weights are not for."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise OmniFP4Error(
            f"dtype {str(dtype).removeprefix('torch.')} was asked for, but this checkpoint is quantized: its weights are "
            "NVFP4, unpacked to BF16; another dtype saves no memory, and float16 may overflow",
            hint="use dtype='auto'; torch.bfloat16 and torch.float32 are also allowed",
        )


def _open(files: Sequence[str] | None) -> Checkpoint:
    folders = {str(Path(file).parent) for file in files or ()}
    if len(folders) != 1:
        raise CheckpointError(f"an NVFP4 checkpoint must be one folder of safetensors files, not {sorted(folders)}")
    return open_checkpoint(folders.pop())


def mend_talker(model: Any) -> None:
    """Give the talker's config what its code reads.

    Transformers 5.17 to 5.23 read `audio_config` from the talker's config when speech follows an audio input, where it
    is not declared.
    """
    talker, thinker = getattr(model, "talker", None), getattr(model, "thinker", None)
    if talker is None or thinker is None:
        return
    if (
        getattr(talker.config, "audio_config", None) is None
        and getattr(thinker.config, "audio_config", None) is not None
    ):
        talker.config.audio_config = thinker.config.audio_config
