"""What a quantized checkpoint says of itself: linears by their tensors, claims by the config, from any tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifp4.checkpoint.artifact import ENGINE_PLACE, find_claims, find_linears, parse_claim
from omnifp4.checkpoint.dialects import DIALECTS, Activations, Dialect
from omnifp4.checkpoint.header import TensorEntry


def entry(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, "model.safetensors", dtype, shape, 0, 0)


def entries(*tensors: tuple[str, str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    return {tensor[0]: entry(*tensor) for tensor in tensors}


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
@pytest.mark.parametrize("activations", Activations)
def test_a_stored_linear_is_found(dialect: Dialect, activations: Activations) -> None:
    stored = dialect.stored("layer.proj", (32, 64), activations)
    tensors = entries(*((tensor.name, tensor.dtype, tensor.shape) for tensor in stored), ("norm.weight", "BF16", (64,)))
    found = find_linears(tensors)
    assert list(found) == ["layer.proj"]
    linear = found["layer.proj"]
    assert linear.packed.shape == (32, 32)
    assert linear.block_scale is not None
    assert linear.block_scale.shape == (32, 4)
    assert linear.tensor_scale is not None
    assert (linear.input_scale is not None) == (activations is Activations.FP4)
    assert linear.reciprocal == dialect.reciprocal


def test_parts_may_be_missing_and_codes_may_be_no_codes() -> None:
    found = find_linears(entries(("a.weight", "U8", (4, 8)), ("b.weight_packed", "U8", (4, 8))))
    assert {module: linear.block_scale for module, linear in found.items()} == {"a": None, "b": None}
    # Weights that were left wide beside scales: the artifact that did nothing.
    found = find_linears(entries(("a.weight", "BF16", (4, 16)), ("a.weight_scale", "F8_E4M3", (4, 1))))
    assert found["a"].packed.dtype == "BF16"
    assert not find_linears(entries(("a.weight", "BF16", (4, 16)), ("a.bias", "BF16", (4,))))
    # An FP8 linear of another scheme.
    assert not find_linears(entries(("a.weight", "F8_E4M3", (4, 16)), ("a.weight_scale", "F32", ())))


def test_claims_the_right_place_first(tmp_path: Path) -> None:
    claim = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    config = {"thinker_config": {"text_config": {"quantization_config": claim}}, "quantization_config": claim}
    legacy = {"quantization": {"quant_algo": "W4A16_NVFP4", "group_size": 16, "exclude_modules": ["visual*"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(legacy))
    found = find_claims(config, tmp_path)
    assert [item.place for item in found] == [
        ENGINE_PLACE,
        "config.json: thinker_config.text_config.quantization_config",
        "hf_quant_config.json",
    ]
    assert [item.activations for item in found] == [Activations.FP4, Activations.FP4, Activations.WIDE]
    assert found[2].ignore == ("visual*",)
    assert found[2].group_size == 16
    assert not find_claims({"model_type": "llama"}, None)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
@pytest.mark.parametrize("activations", Activations)
def test_a_written_config_is_read_again(dialect: Dialect, activations: Activations) -> None:
    config = dialect.quantization_config(activations, ["lm_head", "re:.*gate$"], {"name": "x", "version": "1"})
    claim = find_claims({"quantization_config": json.loads(json.dumps(config))}, None)[0]
    assert (claim.dialect, claim.activations, claim.group_size) == (dialect.name, activations, 16)
    assert claim.ignore == ("lm_head", "re:.*gate$")


def test_claims_of_other_tools() -> None:
    weights = {"num_bits": 4, "type": "float", "group_size": 16}
    compressed = {
        "quant_method": "compressed-tensors",
        "config_groups": {"NVFP4A16": {"weights": weights}},
        "ignore": [],
    }
    assert parse_claim(compressed, "x").activations is Activations.WIDE
    assert parse_claim(compressed, "x").group_size == 16
    group = {"weights": weights, "input_activations": {**weights, "dynamic": "local"}}
    assert parse_claim({**compressed, "config_groups": {"a": group}}, "x").activations is Activations.FP4
    assert parse_claim({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, "x").activations is Activations.WIDE


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["quantization", "config_groups", "weights", "group_size", "ignore", "quant_algo", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(VALUES)
def test_any_config_is_read(value: Any) -> None:
    find_claims(
        {"quantization_config": value, "a": {"quantization_config": {"config_groups": value, "ignore": value}}}, None
    )
    parse_claim({"quantization": value, "config_groups": {"g": value}}, "x")


def test_deep_configs_are_no_trouble() -> None:
    config: dict[str, Any] = {}
    for _ in range(3000):
        config = {"deeper": config}
    assert not find_claims(config, None)
