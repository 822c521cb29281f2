"""The defaults stated in the schemas are those of Transformers' config classes."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
from tiny_model_configs import QWEN3_OMNI

import omnifp4.models
from omnifp4.models import layout_for
from omnifp4.models.section import Schema

SCHEMAS = {
    value.source: value
    for module in pkgutil.iter_modules(omnifp4.models.__path__, "omnifp4.models.")
    if not module.name.endswith(".source")
    for value in vars(importlib.import_module(module.name)).values()
    if isinstance(value, Schema)
}


def config_class(transformers: Any, name: str) -> Any:
    if hasattr(transformers, name):
        return getattr(transformers, name)
    for module_name in ("qwen3_omni_moe", "qwen2_5_omni", "qwen3_vl_moe"):
        module = importlib.import_module(f"transformers.models.{module_name}.configuration_{module_name}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"Transformers has no config class {name}")


def test_every_config_class_is_covered() -> None:
    assert len(SCHEMAS) == 25


@pytest.mark.parametrize("source", sorted(SCHEMAS))
def test_defaults_are_those_of_transformers(source: str, transformers: Any) -> None:
    known = config_class(transformers, source)
    for key, value in SCHEMAS[source].defaults.items():
        assert getattr(known, key) == value, f"{source}.{key}"


@pytest.mark.parametrize("source", sorted(SCHEMAS))
def test_second_names_are_those_of_transformers(source: str, transformers: Any) -> None:
    attribute_map = config_class(transformers, source).attribute_map
    for key, alias in SCHEMAS[source].aliases.items():
        # The map goes from the name in code to the name on disk, which may be either of the two.
        assert attribute_map.get(alias) == key or attribute_map.get(key) == alias, f"{source}.{key}"


def test_keys_equal_to_a_default_may_be_left_out() -> None:
    config = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {
            "text_config": {"model_type": "qwen3_omni_moe_text"},
            "audio_config": {"model_type": "qwen3_omni_moe_audio_encoder"},
            "vision_config": {"model_type": "qwen3_omni_moe_vision_encoder"},
        },
    }
    shapes = {tensor.name: tensor.shape for tensor in layout_for(config).tensors}
    assert shapes["thinker.model.layers.27.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert shapes["thinker.visual.merger.mlp.2.weight"] == (3584, 4608)
    assert shapes["thinker.audio_tower.conv_out.weight"] == (1280, 480 * 16)


def test_a_vocoder_that_is_all_default_may_be_left_out() -> None:
    config = {key: value for key, value in QWEN3_OMNI.items() if key != "code2wav_config"}
    shapes = {tensor.name: tensor.shape for tensor in layout_for(config).tensors}
    assert shapes["code2wav.code_embedding.weight"] == (2048 * 16, 1024)
