"""How weights are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_reading import to_float

from omnifp4.tiny import weights


def test_quantiles_are_those_of_students_t() -> None:
    quantiles = weights.unit_quantiles()
    assert quantiles.shape == (65_536,)
    assert (np.diff(quantiles) > 0).all()
    assert (quantiles == -quantiles[::-1]).all()
    assert quantiles.std() == pytest.approx(1.0, abs=2e-3)
    # Percentage points of t with 5 degrees of freedom (any table), in units of its standard deviation.
    for probability, point in ((0.75, 0.7267), (0.95, 2.0150), (0.99, 3.3649), (0.999, 5.8934)):
        value = np.interp(probability, (np.arange(65_536) + 0.5) / 65_536, quantiles)
        assert value * (5 / 3) ** 0.5 == pytest.approx(point, abs=2e-4)


def test_tables_never_hold_zero() -> None:
    for mean, std in ((0.0, 1e-3), (0.0, 3.0), (1.0, 0.08)):
        values = to_float(weights.quantile_table(mean, std))
        assert np.isfinite(values).all()
        assert (values != 0).all()
        assert values.mean() == pytest.approx(mean, abs=1e-3)
        assert values.std() == pytest.approx(std, rel=0.01)


def test_rounding_is_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, 1.0039064, -1.00390625], np.float32)
    expected = np.array([1.0, 1.0, 1.015625, 1.0078125, -1.0], np.float32)
    assert (to_float(weights.bf16_bits(values)) == expected).all()
    torch = pytest.importorskip("torch", reason="torch is not installed")
    many = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    rounded = torch.from_numpy(many).to(torch.bfloat16).view(torch.uint16).numpy()
    assert (weights.bf16_bits(many) == rounded).all()


def test_stream_is_the_bit_generators_own() -> None:
    """`Generator.integers` may change between numpy versions; the bit generator may not."""
    drawn = weights.stream(3, "a").integers(0, 2**64 - 1, size=1000, dtype=np.uint64, endpoint=True)
    assert (drawn == weights.stream(3, "a").bit_generator.random_raw(1000)).all()
    assert (drawn != weights.stream(3, "b").bit_generator.random_raw(1000)).any()
    assert (drawn != weights.stream(4, "a").bit_generator.random_raw(1000)).any()


@pytest.mark.parametrize("elements", [1, 3, 65_535, 65_536, 65_537, 200_001])
def test_fill_reaches_every_element(elements: int) -> None:
    out = np.zeros((elements, 1), np.uint16)
    weights.fill(out, weights.Draw(0.0, 1.0), 0, "x")
    assert (out != 0).all()


def test_outliers_are_exact_multiples() -> None:
    plain, wide = np.empty((64, 128), np.uint16), np.empty((64, 128), np.uint16)
    weights.fill(plain, weights.Draw(0.0, 0.1), 5, "w")
    weights.fill(wide, weights.Draw(0.0, 0.1, outlier_channels=True), 5, "w")
    ratio = to_float(wide) / to_float(plain)
    channels = weights.outlier_channels(5, "w", 128)
    assert channels.size == 2
    assert (ratio[:, channels] == 4).all()
    assert (np.delete(ratio, channels, axis=1) == 1).all()


@pytest.mark.parametrize(
    ("name", "shape", "draw"),
    [
        ("thinker.model.layers.0.input_layernorm.weight", (64,), weights.Draw(1.0, 0.08)),
        ("thinker.model.layers.0.self_attn.q_norm.weight", (64,), weights.Draw(1.0, 0.08)),
        ("thinker.visual.blocks.0.norm1.weight", (64,), weights.Draw(1.0, 0.08)),
        ("thinker.visual.merger.ln_q.weight", (64,), weights.Draw(1.0, 0.08)),
        ("thinker.audio_tower.layers.0.self_attn_layer_norm.bias", (64,), weights.Draw(0.0, 0.02)),
        ("thinker.model.layers.0.mlp.gate.weight", (8, 64), weights.Draw(0.0, 1.5 / 8)),
        ("thinker.model.layers.0.mlp.experts.0.gate_proj.weight", (8, 64), weights.Draw(0.0, 1 / 8, True)),
        ("thinker.lm_head.weight", (8, 64), weights.Draw(0.0, 2.5 / 8)),
        ("talker.code_predictor.lm_head.0.weight", (8, 64), weights.Draw(0.0, 2.5 / 8)),
        ("talker.code_predictor.model.codec_embedding.0.weight", (8, 64), weights.Draw(0.0, 0.5)),
        ("code2wav.upsample.0.1.norm.weight", (64,), weights.Draw(1.0, 0.08)),
        ("code2wav.upsample.0.1.gamma", (64,), weights.Draw(0.25, 0.02)),
        ("code2wav.pre_transformer.layers.0.mlp_layer_scale.scale", (64,), weights.Draw(0.25, 0.02)),
        ("code2wav.decoder.1.block.0.alpha", (64,), weights.Draw(0.0, 0.2)),
        ("code2wav.decoder.1.block.1.conv.weight", (64, 32, 16), weights.Draw(0.0, 128**-0.5)),
        ("code2wav.upsample.0.1.dwconv.conv.weight", (64, 1, 7), weights.Draw(0.0, 7**-0.5)),
    ],
)
def test_draw_fits_the_role(name: str, shape: tuple[int, ...], draw: weights.Draw) -> None:
    chosen = weights.draw_for(name, shape, is_linear=name.endswith("proj.weight"))
    assert (chosen.mean, chosen.outlier_channels) == (draw.mean, draw.outlier_channels)
    assert chosen.std == pytest.approx(draw.std)
