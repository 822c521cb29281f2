"""The compiled loops against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from formats_near_ties import count_near_ties

from omnifp4.formats import fast_cpu, reference
from omnifp4.formats.nvfp4 import E4M3_VALUES, EncodeStats, NVFP4Tensor, ScaleRule, pack

RULES = list(ScaleRule)


def encode(source, rule, importance=None, tensor_scale=None) -> tuple[NVFP4Tensor, EncodeStats]:
    """Encode into poisoned arrays."""
    rows, columns = source.wide.shape
    packed, block_scale = np.full((rows, columns // 2), 0xA5, np.uint8), np.full((rows, columns // 16), 0xFF, np.uint8)
    if tensor_scale is None:
        tensor_scale = reference.tensor_scale_for(float(np.abs(source.wide).max()), rule)
    stats = fast_cpu.encode_into(source.raw, source.dtype, rule, tensor_scale, packed, block_scale, importance)
    return NVFP4Tensor(packed, block_scale, tensor_scale), stats


@pytest.mark.parametrize("rule", RULES)
def test_twin_of_the_reference(source, rule: ScaleRule) -> None:
    encoded, stats = encode(source, rule)
    ties = count_near_ties(source.wide, encoded, rule)
    assert ties <= max(2, encoded.block_scale.size // 500)
    codes = reference.encode_codes(source.wide, encoded.block_scale, encoded.tensor_scale)
    np.testing.assert_array_equal(encoded.packed, pack(codes))
    loss = float(np.square(source.wide.astype(np.float64) - reference.decode(encoded)).sum())
    energy = float(np.square(source.wide, dtype=np.float64).sum())
    assert stats.squared_error == pytest.approx(loss, rel=1e-5, abs=1e-12 * energy)
    assert stats.energy == pytest.approx(energy, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_near_ties_are_rare(rule: ScaleRule) -> None:
    """65,536 blocks: enough that each of the eleven candidates wins somewhere, but for the lowest."""
    weight = np.random.default_rng(8).standard_normal((512, 2048), dtype=np.float32)
    encoded, _ = fast_cpu.encode(weight, "F32", rule)
    assert count_near_ties(weight, encoded, rule) <= 6
    if rule is ScaleRule.SWEEP:
        by_max = reference.choose_block_scales(weight, encoded.tensor_scale, ScaleRule.MAX)
        offsets = encoded.block_scale.astype(int) - by_max
        assert set(np.unique(offsets)) >= set(range(-2, 8))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(336,), (40, 336)])
def test_importance(rule: ScaleRule, shape: tuple[int, ...], make_source) -> None:
    rng = np.random.default_rng(5)
    importance = rng.exponential(size=shape).astype(np.float32) ** 3
    importance[..., 32:64] = 0.0
    importance[..., 64:80] *= 1e-30
    source = make_source("heavy-tailed", "BF16")
    encoded, stats = encode(source, rule, importance)
    assert count_near_ties(source.wide, encoded, rule, importance) <= 2
    loss = np.square(source.wide.astype(np.float64) - reference.decode(encoded)).sum()
    assert stats.squared_error == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("factor", [1.0, 1.37, 3e-5])
def test_a_given_tensor_scale(factor: float, make_source) -> None:
    """Of a group whose other tensor is larger, or (3e-5) of one that makes every block saturate."""
    source = make_source("random", "BF16")
    scale = np.float32(reference.tensor_scale_for(float(np.abs(source.wide).max()) * 7, ScaleRule.SWEEP) * factor)
    for rule in RULES:
        encoded, stats = encode(source, rule, tensor_scale=scale)
        assert count_near_ties(source.wide, encoded, rule) <= 2
        codes = reference.encode_codes(source.wide, encoded.block_scale, scale)
        np.testing.assert_array_equal(encoded.packed, pack(codes))
        loss = float(np.square(source.wide.astype(np.float64) - reference.decode(encoded)).sum())
        assert stats.squared_error == pytest.approx(loss, rel=1e-5)


def test_a_tensor_far_smaller_than_its_group(make_source) -> None:
    source = make_source("random", "BF16")
    encoded, stats = encode(source, ScaleRule.SWEEP, tensor_scale=np.float32(2.0**80))
    assert not (encoded.packed & 0x77).any()
    energy = float(np.square(source.wide, dtype=np.float64).sum())
    assert stats == pytest.approx((energy, energy), rel=1e-9)


def test_views_and_bytes_that_are_not_aligned(make_source) -> None:
    source = make_source("random", "BF16")
    expected, _ = encode(source, ScaleRule.SWEEP)
    shifted = np.empty(source.raw.nbytes + 1, np.uint8)[1:].view(np.uint16).reshape(source.raw.shape)
    shifted[:] = source.raw
    wider = np.repeat(source.raw, 2, axis=1)
    views = {"transposed": np.ascontiguousarray(source.raw.T).T, "unaligned": shifted, "strided": wider[:, ::2]}
    padded = np.zeros((source.raw.shape[1], 99), np.uint16)
    padded[:, : source.raw.shape[0]] = source.raw.T
    views["part of a transposed one"] = padded[:, : source.raw.shape[0]].T
    for name, view in views.items():
        encoded, _ = fast_cpu.encode(view, "BF16", ScaleRule.SWEEP)
        np.testing.assert_array_equal(encoded.packed, expected.packed, err_msg=name)


def test_scan(source) -> None:
    assert fast_cpu.scan(source.raw, source.dtype) == (float(np.abs(source.wide).max()), -1)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_found_and_refused(dtype: str, value: float, make_source) -> None:
    source = make_source("random", dtype)
    raw = source.raw.copy()
    bits = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    sign = {"BF16": 0x8000, "F16": 0x8000, "F32": 0x80000000}[dtype]
    flat = raw.reshape(-1).view(np.uint32 if dtype == "F32" else np.uint16)
    for index in (4321, 4322):
        flat[index] = bits | (1 if np.isnan(value) else 0) | (sign if value < 0 else 0)
    assert fast_cpu.scan(raw, dtype).nonfinite_index == 4321
    with pytest.raises(ValueError, match="flat index 4321"):
        fast_cpu.encode(raw, dtype)
    outputs = np.empty((40, 168), np.uint8), np.empty((40, 21), np.uint8)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fast_cpu.encode_into(raw, dtype, ScaleRule.SWEEP, np.float32(1e-4), *outputs)


def test_wrong_arguments_are_named(make_source) -> None:
    source = make_source("random", "BF16")
    packed, block_scale = np.empty((40, 168), np.uint8), np.empty((40, 21), np.uint8)
    arguments = (ScaleRule.SWEEP, np.float32(1e-4), packed, block_scale)
    with pytest.raises(ValueError, match="I8"):
        fast_cpu.encode_into(source.raw, "I8", *arguments)
    with pytest.raises(ValueError, match="4 bytes"):
        fast_cpu.encode_into(source.raw, "F32", *arguments)
    with pytest.raises(ValueError, match="multiple of 16"):
        fast_cpu.encode_into(source.raw[:, :-1], "BF16", *arguments)
    with pytest.raises(ValueError, match="packed_out"):
        fast_cpu.encode_into(source.raw, "BF16", ScaleRule.SWEEP, np.float32(1e-4), packed.T.copy().T, block_scale)
    with pytest.raises(ValueError, match="far too small"):
        fast_cpu.encode_into(source.raw, "BF16", ScaleRule.SWEEP, np.float32(1e-20), packed, block_scale)
    with pytest.raises(ValueError, match="negative"):
        fast_cpu.encode_into(source.raw, "BF16", *arguments, -np.ones(336, np.float32))
    with pytest.raises(ValueError, match="importance has shape"):
        fast_cpu.encode_into(source.raw, "BF16", *arguments, np.ones(335, np.float32))


def test_decode_is_the_references() -> None:
    rng = np.random.default_rng(3)
    scales = np.arange(256, dtype=np.uint8).repeat(3)
    scales = rng.permutation(np.resize(scales[(scales & 0x7F) != 0x7F], 30 * 25)).reshape(30, 25)
    tensor = NVFP4Tensor(rng.integers(0, 256, (30, 200), dtype=np.uint8), scales, np.float32(0.0123))
    expected = reference.decode(tensor)
    np.testing.assert_array_equal(fast_cpu.decode(tensor).view(np.uint32), expected.view(np.uint32))
    out = np.full(expected.shape, 0x7FC0, np.uint16)
    fast_cpu.decode_into(tensor.packed, fast_cpu.effective_scale(scales, tensor.tensor_scale), out)
    np.testing.assert_array_equal(out, fast_cpu.bf16_bits(expected))


def test_reciprocal_scale_divides() -> None:
    scales = np.array([[0x38, 0x7E, 0x01]], np.uint8)
    stored = np.float32(3.0)
    divided = fast_cpu.effective_scale(scales, stored, reciprocal=True)
    np.testing.assert_array_equal(divided, E4M3_VALUES[scales] / stored)


def test_bf16_bits_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    bits = rng.integers(0, 2**32, 50_000, dtype=np.uint64).astype(np.uint32)
    bits[:4096] = (bits[:4096] & 0xFFFF0000) | 0x8000
    values = bits.view(np.float32)
    torchs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(fast_cpu.bf16_bits(values)[finite], torchs[finite])
    assert ((fast_cpu.bf16_bits(values)[~finite] & 0x7FFF) > 0x7F80).all()


def test_compare(source) -> None:
    encoded, _ = encode(source, ScaleRule.MAX)
    decoded = reference.decode(encoded).astype(np.float64)
    wide = source.wide.astype(np.float64)
    found = fast_cpu.compare(source.raw, source.dtype, encoded.packed, encoded.block_scale, encoded.tensor_scale)
    energy = float(np.square(wide).sum())
    assert found.squared_error == pytest.approx(float(np.square(wide - decoded).sum()), rel=1e-6, abs=1e-14 * energy)
    assert found.energy == pytest.approx(energy, rel=1e-12)
    assert found.max_abs_error == np.abs(source.wide - decoded.astype(np.float32)).max()
    assert (found.nonfinite, found.zero_scales, found.nan_scales) == (0, 0, 0)
    swapped = decoded.reshape(*decoded.shape[:-1], -1, 2)[..., ::-1].reshape(decoded.shape)
    assert found.swapped_squared_error == pytest.approx(
        float(np.square(wide - swapped).sum()), rel=1e-6, abs=1e-14 * energy
    )


def test_compare_sees_damage(make_source) -> None:
    source = make_source("random", "BF16")
    encoded, _ = encode(source, ScaleRule.MAX)
    block_scale, raw = encoded.block_scale.copy(), source.raw.copy()
    block_scale[3, 4], block_scale[7, 0], block_scale[39, 20] = 0x7F, 0x00, 0xFF
    # A place that the last panel, which is not full, has no block for.
    block_scale[35, 5] = 0x7F
    raw[20, 5] = 0x7F80
    found = fast_cpu.compare(raw, "BF16", encoded.packed, block_scale, encoded.tensor_scale)
    assert (found.nonfinite, found.zero_scales, found.nan_scales) == (49, 1, 3)
    assert np.isfinite([found.squared_error, found.energy, found.max_abs_error]).all()
    swapped = ((encoded.packed << 4) | (encoded.packed >> 4)).astype(np.uint8)
    found = fast_cpu.compare(source.raw, "BF16", swapped, encoded.block_scale, encoded.tensor_scale)
    assert found.swapped_squared_error < 0.02 * found.squared_error
    inverse = np.float32(1) / encoded.tensor_scale
    divided = fast_cpu.compare(source.raw, "BF16", encoded.packed, encoded.block_scale, inverse, reciprocal=True)
    assert divided.squared_error / divided.energy < 0.01
