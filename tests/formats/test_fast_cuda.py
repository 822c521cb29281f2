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
from omnifp4.formats.nvfp4 import NVFP4Tensor, ScaleRule, pack  # noqa: E402

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


def test_refusals(make_source) -> None:
    weight = to_torch(make_source("random", "BF16"))
    with pytest.raises(ValueError, match="multiple of 16"):
        fast_cuda.encode_cuda(weight[:, :-1])
    with pytest.raises(ValueError, match="float64"):
        fast_cuda.encode_cuda(weight.double())
    with pytest.raises(ValueError, match="far too small"):
        fast_cuda.encode_cuda(weight, tensor_scale=torch.tensor(1e-20))
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
