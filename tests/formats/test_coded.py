"""FP8, MXFP4 and INT8: against torch's own types, against plain definitions, and at their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from omnifp4.formats import coded, fp8, int8, mxfp4
from omnifp4.formats.coded import CODED_SCHEMES
from omnifp4.formats.nvfp4 import E2M1_MAGNITUDES, E4M3_VALUES, ScaleRule, unpack
from omnifp4.formats.reference import round_to_bf16, round_to_e2m1
from omnifp4.formats.scheme import Scheme

RULES = tuple(ScaleRule)
WEIGHTS = {
    "gauss": lambda random: random.standard_normal((24, 160)),
    "heavy": lambda random: random.standard_t(3, (24, 160)),
    "rows of many sizes": lambda random: (
        random.standard_normal((24, 160)) * np.exp2(random.integers(-90, 90, 24))[:, None]
    ),
    "zeros among them": lambda random: random.standard_normal((24, 160)) * (np.arange(24) % 3 > 0)[:, None],
}


@pytest.fixture(params=WEIGHTS)
def weight(request: pytest.FixtureRequest) -> npt.NDArray[np.float32]:
    return np.asarray(WEIGHTS[request.param](np.random.default_rng(5)), dtype=np.float32)


@pytest.mark.parametrize("scheme", CODED_SCHEMES)
@pytest.mark.parametrize("rule", RULES)
def test_every_value_goes_to_the_nearest_one(weight: Any, scheme: Scheme, rule: ScaleRule) -> None:
    done = coded.encode(weight, scheme, rule)
    scale = mxfp4.E8M0_VALUES[done.scale].repeat(32, axis=1) if scheme is Scheme.MXFP4 else done.scale[:, None]
    grid = {
        Scheme.MXFP4: np.concatenate([-E2M1_MAGNITUDES[::-1], E2M1_MAGNITUDES]),
        Scheme.FP8: np.unique(E4M3_VALUES[np.isfinite(E4M3_VALUES)]),
        Scheme.INT8: np.arange(-127.0, 128.0, dtype=np.float32),
    }[scheme].astype(np.float64)
    units = weight / scale.astype(np.float64)
    right = np.searchsorted(grid, units).clip(1, len(grid) - 1)
    nearest = np.minimum(np.abs(units - grid[right - 1]), np.abs(units - grid[right]))
    chosen = np.abs(units - coded.decode(done) / scale.astype(np.float64))
    assert (chosen <= nearest * (1 + 1e-5) + np.abs(units) * 2e-7).all()


@pytest.mark.parametrize("scheme", CODED_SCHEMES)
def test_encoding_what_was_decoded_changes_nothing(weight: Any, scheme: Scheme) -> None:
    once = coded.decode(coded.encode(weight, scheme))
    codes = coded.encode_codes(once, scheme, coded.encode(weight, scheme).scale)
    assert (codes == coded.encode(weight, scheme).codes).all() or scheme is Scheme.MXFP4
    assert (coded.decode(coded.CodedTensor(scheme, codes, coded.encode(weight, scheme).scale)) == once).all()


@pytest.mark.parametrize("scheme", CODED_SCHEMES)
def test_rows_do_not_see_each_other(weight: Any, scheme: Scheme) -> None:
    whole = coded.encode(weight, scheme)
    parts = [coded.encode(weight[begin : begin + 7], scheme) for begin in range(0, 24, 7)]
    assert (np.concatenate([part.codes for part in parts]) == whole.codes).all()
    assert (np.concatenate([part.scale for part in parts]) == whole.scale).all()


def test_fp8_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(1)
    values = (random.standard_normal(200_000) * np.exp2(random.integers(-14, 9, 200_000))).astype(np.float32)
    middles = (E4M3_VALUES[:126] + E4M3_VALUES[1:127]) / 2
    values = np.concatenate([values.clip(-448, 448), middles, -middles, [0.0, -0.0, 448.0, -448.0]]).astype(np.float32)
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert (fp8.round_to_bits(values) == theirs).all()
    assert (fp8.round_to_bits(np.array([1e9, -1e9], dtype=np.float32)) == [0x7E, 0xFE]).all()
    codes = np.arange(256, dtype=np.uint8)[None]
    wide = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(fp8.decode(codes, np.ones(1, dtype=np.float32)), wide, equal_nan=True)


def test_fp8_scales(weight: Any) -> None:
    amax = np.abs(weight).max(axis=1)
    exact, power = fp8.choose_scales(weight, ScaleRule.MAX), fp8.choose_scales(weight, ScaleRule.SWEEP)
    assert (exact[amax > 0] == (amax / np.float32(448))[amax > 0]).all()
    assert (exact[amax == 0] == 1).all()
    assert (np.frexp(power)[0] == 0.5).all()
    assert ((power >= exact) & (power < 2 * exact) | (amax == 0)).all()
    decoded = coded.decode(coded.encode(weight, Scheme.FP8))
    assert ((round_to_bf16(decoded).astype(np.uint32) << 16).view(np.float32) == decoded).all()


def test_int8_scales_are_bf16_and_keep_the_largest_value(weight: Any) -> None:
    done = coded.encode(weight, Scheme.INT8)
    assert (done.scale.view(np.uint32) & 0xFFFF == 0).all()
    assert (np.abs(done.codes.astype(int)).max(axis=1)[np.abs(weight).max(axis=1) > 0] >= 126).all()
    assert np.abs(done.codes.astype(int)).max() <= 127


def test_mxfp4_scales_are_those_of_the_specification(weight: Any) -> None:
    amax = np.abs(weight).reshape(24, -1, 32).max(axis=2)
    ocp = mxfp4.choose_scales(weight, ScaleRule.MAX).astype(int)
    with np.errstate(divide="ignore"):
        wanted = np.floor(np.log2(amax.astype(np.float64))) - 2 + 127
    assert (ocp[amax > 0] == np.maximum(wanted, mxfp4.E8M0_MIN_BITS)[amax > 0]).all()
    assert (ocp[amax == 0] == 127).all()
    swept = mxfp4.choose_scales(weight, ScaleRule.SWEEP).astype(int)
    assert np.isin(swept - ocp, (0, 1)).all()
    errors = [
        np.square(weight - mxfp4.decode(mxfp4.encode_codes(weight, bits), bits), dtype=np.float64)
        .reshape(24, -1, 32)
        .sum(axis=2)
        for bits in (ocp.astype(np.uint8), (ocp + 1).astype(np.uint8))
    ]
    better = errors[1] < errors[0] * (1 - 1e-5)
    assert (swept[better] == ocp[better] + 1).all()
    assert (swept[errors[1] > errors[0] * (1 + 1e-5)] == ocp[errors[1] > errors[0] * (1 + 1e-5)]).all()


def test_mxfp4_codes_are_those_of_the_reference_search() -> None:
    middles = (E2M1_MAGNITUDES[:-1] + E2M1_MAGNITUDES[1:]) / 2
    values = np.concatenate([np.linspace(0, 9, 3985), middles, np.nextafter(middles, 0), np.nextafter(middles, 9)])
    values = np.concatenate([values, -values]).astype(np.float32)
    values = np.resize(values, (1, -(-len(values) // 32) * 32))
    ones = np.full((1, values.shape[1] // 32), 127, dtype=np.uint8)
    assert (unpack(mxfp4.encode_codes(values, ones)) == round_to_e2m1(values)).all()


@pytest.mark.parametrize("scheme", CODED_SCHEMES)
@pytest.mark.parametrize("rule", RULES)
def test_errors_are_what_is_expected_of_them(scheme: Scheme, rule: ScaleRule) -> None:
    weight = np.random.default_rng(2).standard_normal((64, 2048)).astype(np.float32)
    stats = coded.error_of(weight, coded.decode(coded.encode(weight, scheme, rule)))
    assert 0.9 < stats.squared_error / stats.energy / coded.EXPECTED_RELATIVE_ERROR[scheme] < 1.05


@pytest.mark.parametrize("scheme", CODED_SCHEMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**127])
def test_what_cannot_be_encoded_is_refused(scheme: Scheme, value: float) -> None:
    weight = np.ones((2, 64), dtype=np.float32)
    weight[1, 3] = value
    with pytest.raises(ValueError, match="cannot be encoded"):
        coded.encode(weight, scheme)
    with pytest.raises(ValueError, match="shape"):
        coded.encode(np.ones(64, dtype=np.float32), scheme)


def test_mxfp4_needs_whole_blocks() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        coded.encode(np.ones((2, 48), dtype=np.float32), Scheme.MXFP4)


def test_smallest_and_largest_weights_keep_finite_scales() -> None:
    for size in (2.0**-149, 2.0**-126, 2.0**-101, 2.0**125):
        weight = np.full((2, 64), size, dtype=np.float32)
        for scheme in CODED_SCHEMES:
            done = coded.encode(weight, scheme)
            decoded = coded.decode(done)
            assert np.isfinite(decoded).all()
            assert size < 2.0**-100 or np.allclose(decoded, weight, rtol=0.2, atol=0)


def test_int8_is_symmetric() -> None:
    weight = np.random.default_rng(3).standard_normal((8, 64)).astype(np.float32)
    assert (
        int8.encode_codes(-weight, int8.choose_scales(weight, ScaleRule.MAX))
        == -coded.encode(weight, Scheme.INT8).codes
    ).all()
