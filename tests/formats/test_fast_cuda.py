"""The Triton kernels against the reference and the compiled loops.

With a GPU they run there; without one the tests marked ``cuda`` skip, and where the triton package is installed its
interpreter runs the same kernels on the CPU. The interpreter does not fuse products and sums, so it is held to
near-ties where the GPU is held to the same bytes.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        pytest.skip("triton was imported before; run with TRITON_INTERPRET=1", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

from formats_near_ties import count_near_ties  # noqa: E402

from omnifp4.formats import fast_cpu, fast_cuda, reference  # noqa: E402
from omnifp4.formats.backend import choose_backend  # noqa: E402
from omnifp4.formats.nvfp4 import AMAX_LIMIT, E4M3_VALUES, Float32Array, NVFP4Tensor, ScaleRule, pack  # noqa: E402

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DEVICE = "cuda" if ON_GPU else "cpu"


def to_torch(source) -> torch.Tensor:
    bits = source.raw.view(np.int32 if source.dtype == "F32" else np.int16)
    return torch.from_numpy(bits.copy()).view(TYPES[source.dtype]).to(DEVICE)


def to_numpy(encoded: fast_cuda.CudaEncoding) -> NVFP4Tensor:
    return NVFP4Tensor(
        encoded.packed.cpu().numpy(), encoded.block_scale.cpu().numpy(), np.float32(encoded.tensor_scale.item())
    )


def check_twin(source, rule: ScaleRule, importance=None) -> None:
    given = None if importance is None else torch.from_numpy(importance).to(DEVICE)
    done = fast_cuda.encode_cuda(to_torch(source), rule, importance=given)
    encoded = to_numpy(done)
    assert count_near_ties(source.wide, encoded, rule, importance) <= 2
    codes = reference.encode_codes(source.wide, encoded.block_scale, encoded.tensor_scale)
    np.testing.assert_array_equal(encoded.packed, pack(codes))
    decoded = fast_cuda.decode_cuda(done.packed, done.block_scale, done.tensor_scale).cpu().numpy()
    np.testing.assert_array_equal(decoded.view(np.uint32), reference.decode(encoded).view(np.uint32))
    twin, stats = fast_cpu.encode(source.raw, source.dtype, rule, importance=importance)
    assert done.squared_error.item() == pytest.approx(stats.squared_error, rel=1e-5, abs=1e-10 * stats.energy)
    if source.name not in ("float32 denormals", "zeros"):
        assert done.energy.item() == pytest.approx(stats.energy, rel=1e-5)
    if ON_GPU:
        np.testing.assert_array_equal(encoded.packed, twin.packed)
        np.testing.assert_array_equal(encoded.block_scale, twin.block_scale)


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no CUDA GPU")
@pytest.mark.parametrize("rule", list(ScaleRule))
def test_every_class_on_the_gpu(source, rule: ScaleRule) -> None:
    check_twin(source, rule)


@pytest.mark.parametrize("rule", list(ScaleRule))
@pytest.mark.parametrize(("name", "dtype"), [("heavy-tailed", "BF16"), ("one huge", "F16"), ("wide range", "F32")])
def test_kernels(name: str, dtype: str, rule: ScaleRule, make_source) -> None:
    check_twin(make_source(name, dtype), rule)


@pytest.mark.parametrize("shape", [(336,), (40, 336)])
def test_importance(shape: tuple[int, ...], make_source) -> None:
    importance = np.random.default_rng(5).exponential(size=shape).astype(np.float32)
    importance[..., 32:64] = 0.0
    check_twin(make_source("random", "BF16"), ScaleRule.SWEEP, importance)


def test_a_batch_is_its_matrices(make_source) -> None:
    weights = [to_torch(make_source(name, "BF16")) for name in ("random", "heavy-tailed")]
    batch = fast_cuda.encode_cuda(torch.stack(weights), ScaleRule.SWEEP)
    decoded = fast_cuda.decode_cuda(batch.packed, batch.block_scale, batch.tensor_scale, torch.bfloat16)
    for i, weight in enumerate(weights):
        alone = fast_cuda.encode_cuda(weight, ScaleRule.SWEEP)
        assert torch.equal(batch.packed[i], alone.packed)
        assert torch.equal(batch.block_scale[i], alone.block_scale)
        assert batch.tensor_scale[i] == alone.tensor_scale
        assert batch.squared_error[i] == alone.squared_error
        assert torch.equal(decoded[i].float().cpu(), torch.from_numpy(reference.decode(to_numpy(alone))))


def check_blocks(blocks: Float32Array, tensor_scale: float = 1.0) -> None:
    """Values that BF16 holds exactly, ``[blocks, 16]``, under a given scale."""
    raw = fast_cpu.bf16_bits(blocks)
    weight = torch.from_numpy(blocks).bfloat16().to(DEVICE)
    done = fast_cuda.encode_cuda(weight, ScaleRule.SWEEP, torch.tensor(tensor_scale))
    twin, stats = fast_cpu.encode(raw, "BF16", ScaleRule.SWEEP, tensor_scale=np.float32(tensor_scale))
    np.testing.assert_array_equal(done.packed.cpu().numpy(), twin.packed)
    np.testing.assert_array_equal(done.block_scale.cpu().numpy(), twin.block_scale)
    assert done.squared_error.item() == pytest.approx(stats.squared_error, rel=1e-5)


@pytest.mark.parametrize("largest_code", range(1, 127) if ON_GPU else (1, 2, 9, 60, 126))
def test_every_quotient(largest_code: int) -> None:
    """Every BF16 magnitude that float16 may stand in for, below a largest one for each block scale."""
    bits = np.arange(0x3700, 0x4600, 1 if ON_GPU else 16, dtype=np.uint32) << 16
    magnitudes = bits.view(np.float32)
    for largest in np.float32([5.625, 6.0, 6.375, 8.0]) * E4M3_VALUES[largest_code]:
        below = magnitudes[magnitudes <= largest]
        blocks = np.full((-(-len(below) // 15), 16), largest, np.float32)
        rows = np.random.default_rng(largest_code).permutation(np.resize(below, len(blocks) * 15))
        blocks[:, 1:] = rows.reshape(-1, 15)
        check_blocks((fast_cpu.bf16_bits(blocks).astype(np.uint32) << 16).view(np.float32))


@pytest.mark.parametrize("tensor_scale", [2.0**-24, 2.0**-12, 1.0, 2.0**10])
def test_what_float16_cannot_hold(tensor_scale: float) -> None:
    """Blocks of random values, of which some are too small for float16 or far beyond the largest scale."""
    rng = np.random.default_rng(9)
    blocks = np.exp2(rng.integers(-14, 12, (400, 1))) * rng.normal(size=(400, 16))
    blocks[rng.random(blocks.shape) < 0.02] *= 2.0**-20
    blocks[rng.random(blocks.shape) < 0.05] = 0.0
    blocks = np.clip(blocks.astype(np.float32), -(2.0**24) * tensor_scale, 2.0**24 * tensor_scale)
    check_blocks((fast_cpu.bf16_bits(blocks).astype(np.uint32) << 16).view(np.float32), tensor_scale)


@pytest.mark.parametrize("exponent", range(-26, -16))
def test_errors_that_float16_cannot_hold(exponent: int) -> None:
    blocks = np.full((32, 16), 1.2578125 * 2.0**exponent, np.float32)
    blocks[:, 3] = 6.0
    check_blocks(blocks)


def test_candidates_that_clip_can_win() -> None:
    """Blocks on the grid of one scale, with a largest value that points to another."""
    rng = np.random.default_rng(0)
    code, offset = rng.integers(64, 72, (3000, 1)), rng.integers(-3, 8, (3000, 1))
    blocks = rng.choice(np.float32([0.5, 1.0, 6.0]), (3000, 16)) * E4M3_VALUES[code]
    largest = 6 * E4M3_VALUES[code - offset]
    blocks[:, 5:6] = np.maximum(blocks[:, 5:6], largest * rng.uniform(0.94, 1.06, largest.shape))
    blocks = np.where(offset > 0, np.minimum(blocks, largest), blocks).astype(np.float32)
    blocks = (fast_cpu.bf16_bits(blocks).astype(np.uint32) << 16).view(np.float32)
    by_max = reference.choose_block_scales(blocks, np.float32(1.0), ScaleRule.MAX).astype(int)
    chosen = reference.choose_block_scales(blocks, np.float32(1.0), ScaleRule.SWEEP).astype(int)
    assert {-3, -2, -1, 0, 1, 4, 5, 6} <= set((chosen - by_max).reshape(-1).tolist())
    check_blocks(blocks)


def test_scales_of_the_sweep() -> None:
    powers = np.exp2(np.arange(-149.0, 127.0))
    amax = np.concatenate([powers * m for m in (1.0, 1.25, 1.5, 1.75)]).astype(np.float32)
    above, below = np.nextafter(amax, np.float32(np.inf)), np.nextafter(amax, np.float32(0.0))
    random = np.random.default_rng(2).integers(0, 0x7E800000, 2000, dtype=np.int32).view(np.float32)
    every = np.concatenate([np.float32([0.0, 767, 768, 769]) * np.float32(2.0**-149), amax, above, below, random])
    every = every[every <= AMAX_LIMIT]
    expected = [reference.tensor_scale_for(float(value), ScaleRule.SWEEP) for value in every]
    scales = fast_cuda.sweep_scales(torch.from_numpy(every).to(DEVICE))
    np.testing.assert_array_equal(scales.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", TYPES.values())
def test_largest_magnitudes(dtype: torch.dtype) -> None:
    values = torch.randn(3, 5, 2064, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[1, 4, 2063] = -77.0
    values[2, 0, 0] = -float("inf")
    largest = fast_cuda.largest_magnitudes(values.to(DEVICE)).cpu()
    assert torch.equal(largest, values.abs().amax(dim=(1, 2)).float())


def test_refusals(make_source) -> None:
    weight = to_torch(make_source("random", "BF16"))
    with pytest.raises(ValueError, match="multiple of 16"):
        fast_cuda.encode_cuda(weight[:, :-1])
    with pytest.raises(ValueError, match="float64"):
        fast_cuda.encode_cuda(weight.double())
    with pytest.raises(ValueError, match="far too small"):
        fast_cuda.encode_cuda(weight, tensor_scale=torch.tensor(1e-20))
    weight[3, 3] = 2.0**127
    with pytest.raises(ValueError, match="cannot be encoded"):
        fast_cuda.encode_cuda(weight)
    weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        fast_cuda.encode_cuda(weight)


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no CUDA GPU")
def test_backend_cuda(make_source) -> None:
    source = make_source("heavy-tailed", "BF16")
    backend, reason = choose_backend("cuda")
    assert torch.cuda.get_device_name() in reason
    encoded, stats = backend.encode(source.raw, "BF16", tensor_scale=np.float32(0.001))
    expected, expected_stats = fast_cpu.encode(source.raw, "BF16", tensor_scale=np.float32(0.001))
    np.testing.assert_array_equal(encoded.packed, expected.packed)
    assert stats.squared_error == pytest.approx(expected_stats.squared_error, rel=1e-5)
