"""What a checkpoint is made of, told from its config and tensor names alone: no model is built, no torch imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from omnifp4.errors import ModelError
from omnifp4.models import bert, llama, qwen2_5_omni, qwen3, qwen3_moe, qwen3_omni_moe, qwen3_vl_moe
from omnifp4.models.base import Component, Config, FusedExperts, Kind, Layout, Part, TensorSpec
from omnifp4.models.section import show

__all__ = [
    "KNOWN_MODEL_TYPES",
    "Component",
    "Config",
    "FusedExperts",
    "Kind",
    "Layout",
    "Part",
    "TensorSpec",
    "layout_for",
]

_LAYOUTS: Mapping[str, Callable[[Config, frozenset[str]], Layout]] = {
    "qwen3_omni_moe": qwen3_omni_moe.layout,
    "qwen3_omni_moe_thinker": qwen3_omni_moe.thinker_layout,
    "qwen2_5_omni": qwen2_5_omni.layout,
    "qwen3_vl_moe": qwen3_vl_moe.layout,
    "qwen3_moe": qwen3_moe.layout,
    "qwen3": qwen3.layout,
    "llama": llama.layout,
    "bert": bert.layout,
}

KNOWN_MODEL_TYPES: tuple[str, ...] = tuple(_LAYOUTS)
"""Every ``model_type`` that has a layout."""


def layout_for(config: Config, names: Iterable[str] = ()) -> Layout:
    """Every tensor that a checkpoint with this config should have.

    Args:
        config: the content of config.json.
        names: names of the tensors that the checkpoint has, used only to settle what a config does not tell (the
            prefix of BERT's names, a stored copy of a tied head). Without them the form that
            Transformers writes is assumed, and tensors that may be missing are marked optional.

    Raises:
        ModelError: no or an unknown ``model_type``, or a config that lacks or contradicts what the layout needs.
    """
    known = ", ".join(KNOWN_MODEL_TYPES)
    if not isinstance(config, Mapping):
        raise ModelError(f"config: it is {show(config)}, not a mapping as in config.json")
    model_type = config.get("model_type")
    if model_type is None:
        raise ModelError(f"config: model_type is missing; known: {known}")
    if not isinstance(model_type, str) or model_type not in _LAYOUTS:
        raise ModelError(f"config: model_type {show(model_type)} has no layout here; known: {known}")
    return _LAYOUTS[model_type](config, frozenset(names))
