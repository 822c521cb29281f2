"""Damaged scales: each is found by the check whose job it is, which names the tensor."""

from __future__ import annotations

import numpy as np
import pytest
from verify_artifacts import assert_fails, check_of

from omnifp4.receipt.base import Verdict

DOWN = "thinker.model.layers.1.mlp.experts.3.down_proj"
GATE = "thinker.model.layers.0.mlp.experts.2.gate_proj"
KEY = "thinker.model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("byte", "words"), [(0x7F, "1 block scales are NaN"), (0xFF, "NaN"), (0xB0, "1 block scales are negative")]
)
@pytest.mark.parametrize("dialect", ["modelopt", "compressed"])
def test_bad_block_scale(request, judge, dialect, byte, words):
    artifact = request.getfixturevalue(dialect)
    scales = artifact.bits(f"{DOWN}.weight_scale")
    scales[5, 3] = byte
    artifact.put(f"{DOWN}.weight_scale", scales)
    assert_fails(judge(artifact), {"scales.finite"}, f"{DOWN}.weight_scale", words)


@pytest.mark.parametrize("byte", [0x00, 0x80])
def test_zero_block_scale(modelopt, judge, byte):
    scales, codes = modelopt.bits(f"{DOWN}.weight_scale"), modelopt.bits(f"{DOWN}.weight")
    scales[5, 3] = byte
    modelopt.put(f"{DOWN}.weight_scale", scales)
    assert_fails(judge(modelopt), {"scales.finite"}, f"{DOWN}.weight_scale", "1 block scales are zero over values")
    codes[5, 24:32] = 0x80  # zero and minus zero: a block that has no value
    modelopt.put(f"{DOWN}.weight", codes)
    receipt = judge(modelopt)
    assert_fails(receipt, set())
    assert "1 blocks with a zero scale have no values" in check_of(receipt, "scales.finite").summary


@pytest.mark.parametrize("value", [-1.0, 0.0, -0.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("dialect", "name"), [("modelopt", "weight_scale_2"), ("compressed", "weight_global_scale")])
def test_unusable_tensor_scale(request, judge, dialect, name, value):
    artifact = request.getfixturevalue(dialect)
    artifact.put_scalar(f"{DOWN}.{name}", value)
    assert_fails(judge(artifact), {"scales.finite"}, f"{DOWN}.{name}", f"tensor scale is {value:g}")


@pytest.mark.parametrize(
    ("dialect", "name", "value"),
    [
        ("modelopt", "weight_scale_2", 2.5e30),
        ("modelopt", "weight_scale_2", 26880.0),
        ("modelopt", "weight_scale_2", 1e-35),
        ("compressed", "weight_global_scale", 2.5e30),
        ("compressed", "weight_global_scale", 3e-5),
    ],
)
def test_implausible_tensor_scale(request, judge, dialect, name, value):
    artifact = request.getfixturevalue(dialect)
    artifact.put_scalar(f"{DOWN}.{name}", value)
    assert_fails(judge(artifact), {"scales.plausible"}, f"{DOWN}.{name}", "weights up to")


def test_denormal_divisor(compressed, judge):
    """1e-43, as uninitialised memory had it: no float32 number is its reciprocal."""
    compressed.put_scalar(f"{DOWN}.weight_global_scale", 1e-43)
    assert_fails(judge(compressed), {"scales.finite", "scales.plausible"}, f"{DOWN}.weight_global_scale", "no finite")


def test_a_forgotten_tensor_scale_stands_out(modelopt, judge):
    name = f"{DOWN}.weight_scale_2"
    modelopt.put_scalar(name, 2688 * modelopt.scalar(name))
    assert_fails(judge(modelopt), {"scales.plausible"}, name, "times the median of its like")


@pytest.mark.parametrize(
    ("dialect", "name"), [("modelopt_w4a4", "input_scale"), ("compressed_w4a4", "input_global_scale")]
)
def test_bad_input_scale(request, judge, dialect, name):
    artifact = request.getfixturevalue(dialect)
    artifact.put_scalar(f"{DOWN}.{name}", np.nan)
    assert_fails(judge(artifact), {"scales.finite"}, f"{DOWN}.{name}", "input scale is nan")
    artifact.put_scalar(f"{DOWN}.{name}", 1e20)
    assert_fails(judge(artifact), {"scales.plausible"}, f"{DOWN}.{name}")


@pytest.mark.parametrize("module", [GATE, KEY])
@pytest.mark.parametrize(("dialect", "name"), [("modelopt", "weight_scale_2"), ("compressed", "weight_global_scale")])
def test_fused_linears_disagree(request, judge, dialect, name, module):
    artifact = request.getfixturevalue(dialect)
    value = np.float32(artifact.scalar(f"{module}.{name}"))
    artifact.put_scalar(f"{module}.{name}", np.nextafter(value, np.float32(1)))
    parent, _, leaf = module.rpartition(".")
    assert_fails(judge(artifact), {"scales.shared"}, f"{parent}: tensor scales differ", leaf, "1 of 18 groups")


def test_fused_linears_disagree_on_inputs(modelopt_w4a4, judge):
    modelopt_w4a4.put_scalar(f"{GATE}.input_scale", 0.02)
    assert_fails(judge(modelopt_w4a4), {"scales.shared"}, "input scales differ")


def test_missing_input_scale_of_one_expert(modelopt_w4a4, judge):
    del modelopt_w4a4.tensors[f"{DOWN}.input_scale"]
    assert_fails(judge(modelopt_w4a4), {"scales.inputs"}, DOWN, "1 of 56")


def test_input_scales_in_w4a16_are_harmless(modelopt_w4a4, judge):
    modelopt_w4a4.quantization["quant_algo"] = "W4A16_NVFP4"
    receipt = judge(modelopt_w4a4)
    assert_fails(receipt, set())
    assert "56 are there, and are not used" in check_of(receipt, "scales.inputs").summary
    assert check_of(receipt, "scales.inputs").verdict is Verdict.PASS
