"""The prefill kernels against their reference: on the GPU if there is one, otherwise in Triton's interpreter.

The interpreter cuts float32 to bfloat16 where a GPU rounds to nearest, so that bfloat16 is held to a bound twice as wide
there, and to equal bits only where nothing is rounded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        pytest.skip("triton was imported before; run with TRITON_INTERPRET=1", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

from omnifp4.kernels.prefill import experts as experts_room  # noqa: E402
from omnifp4.kernels.prefill import reference  # noqa: E402
from omnifp4.kernels.prefill.experts import experts, experts_unpacked_first  # noqa: E402
from omnifp4.kernels.prefill.matrices import PackedMatrices  # noqa: E402
from omnifp4.kernels.prefill.products import Tile, linear, split_columns  # noqa: E402
from omnifp4.kernels.prefill.routing import route  # noqa: E402
from omnifp4.kernels.prefill.unpacking import dequantize  # noqa: E402
from omnifp4.runtime.backends.torch_ops import TorchBackend  # noqa: E402
from omnifp4.runtime.packed import PackedWeight  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
SMALL = Tile(rows=64 if ON_GPU else 32, tokens=16, depth=64, warps=4, stages=2)
BOUNDS = {torch.bfloat16: 0.006 if ON_GPU else 0.012, torch.float16: 0.001}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN, or a number that no table allows: what is read unwritten shows."""
    fresh, fresh_like = torch.empty, torch.empty_like

    def poison(tensor: Any) -> Any:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(fresh(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(fresh_like(*a, **k)))
    yield


def random_matrices(count: int, rows: int, columns: int, *, reciprocal: bool = False, seed: int = 0) -> PackedMatrices:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (count, rows, columns // 2), generator=generator, dtype=torch.uint8)
    # Subnormal block scales, too.
    block_scale = torch.randint(0, 0x38, (count, rows, columns // 16), generator=generator, dtype=torch.uint8)
    scale = torch.rand(count, generator=generator) * 0.2 + 0.1
    tensors = (packed, block_scale, scale.reciprocal() if reciprocal else scale)
    return PackedMatrices(*(tensor.to(DEVICE) for tensor in tensors), reciprocal)


def random_slots(tokens: int, count: int, places: int, width: int, dtype: Any, seed: int = 1) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)
    index = torch.stack([torch.randperm(count, generator=generator)[:places] for _ in range(tokens)])
    return hidden, index.to(DEVICE), torch.rand(tokens, places, generator=generator).to(DEVICE, dtype)


def assert_near(found: Any, expected: Any, bound: float) -> None:
    assert found.isfinite().all()
    assert float((found.double() - expected.double()).norm() / expected.double().norm()) < bound


def every_number(reciprocal: bool, tensor_scale: float) -> PackedWeight:
    """All codes under all block scales but NaN, negative ones too."""
    scales = torch.tensor([s for s in range(256) if s & 0x7F != 0x7F], dtype=torch.uint8)[:, None]
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scales), 1)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return PackedWeight(packed.to(DEVICE), scales.to(DEVICE), torch.tensor(tensor_scale, device=DEVICE), reciprocal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("reciprocal", "tensor_scale"), [(False, 2.0**-9), (False, 0.000389462), (True, 2234.18)])
def test_unpacking_gives_the_bits_of_torch(reciprocal: bool, tensor_scale: float, dtype: Any) -> None:
    if dtype == torch.bfloat16 and not ON_GPU and tensor_scale != 2.0**-9:
        pytest.skip("the interpreter does not round to bfloat16")
    weight = every_number(reciprocal, tensor_scale)
    found = dequantize(weight.packed, weight.block_scale, weight.tensor_scale, reciprocal, dtype)
    expected = TorchBackend().dequantize(weight, dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(bits), expected.view(bits))


def test_unpacking_a_batch_and_nan_scales() -> None:
    weight = random_matrices(3, 40, 48)
    weight.block_scale[1, 2, 1] = 0x7F
    found = dequantize(weight.packed, weight.block_scale, weight.tensor_scale, False, torch.float32)
    for expert in range(3):
        one = PackedWeight(weight.packed[expert], weight.block_scale[expert], weight.tensor_scale[expert], False)
        expected = TorchBackend().dequantize(one, torch.float32)
        assert torch.equal(found[expert].isnan(), expected.isnan())
        assert torch.equal(found[expert].nan_to_num(), expected.nan_to_num())
    assert int(found.isnan().sum()) == 16


@pytest.mark.parametrize("columns", [8, 40])
def test_columns_that_are_no_blocks_are_refused(columns: int) -> None:
    packed = torch.zeros(4, columns // 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="multiple of 16"):
        dequantize(packed, torch.zeros(4, 1, dtype=torch.uint8), torch.ones(()), False, torch.float32)


def test_splitting() -> None:
    x = torch.randn(5, 48, device=DEVICE).bfloat16()
    assert torch.equal(split_columns(x), torch.cat([x[:, 0::2], x[:, 1::2]], dim=1))


@pytest.mark.parametrize(("tokens", "experts_there", "places"), [(1, 1, 1), (700, 5, 3), (90, 128, 8)])
def test_routing_is_a_stable_sort(tokens: int, experts_there: int, places: int) -> None:
    _, index, _ = random_slots(tokens, experts_there, places, 16, torch.float32)
    if experts_there > 1:
        index[::4, 0] = experts_there  # to no expert
        index[1::4, 0] = -1
        index[index == 2] = 0  # an expert without tokens
    routing = route(index, experts_there, 16)
    slots = index.reshape(-1)
    kept = (slots >= 0) & (slots < experts_there)
    order = torch.argsort(torch.where(kept, slots, experts_there), stable=True)[: int(kept.sum())]
    assert torch.equal(routing.order[: len(order)].long(), order)
    counts = torch.bincount(slots[kept], minlength=experts_there)
    assert torch.equal(routing.ends[:experts_there].long(), counts.cumsum(0))
    expected, end = [], 0
    for expert, count in enumerate(counts.tolist()):
        begin, end = end, end + count
        expected += [(expert, first, end) for first in range(begin, end, 16)]
    tiles = routing.tiles.t().tolist()
    assert [tuple(tile) for tile in tiles[: len(expected)]] == expected
    assert all(tile[0] == -1 for tile in tiles[len(expected) :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "rows", "columns", "reciprocal"), [(19, 40, 80, True), (33, 64, 64, False)])
def test_linear(tokens: int, rows: int, columns: int, reciprocal: bool, dtype: Any) -> None:
    weight = random_matrices(1, rows, columns, reciprocal=reciprocal)
    x = torch.randn(tokens, columns, device=DEVICE).to(dtype)
    bias = torch.randn(rows, device=DEVICE).to(dtype)
    assert_near(linear(x, weight, SMALL, bias), reference.linear(x, weight, bias), BOUNDS[dtype])
    assert_near(linear(x, weight, SMALL), reference.linear(x, weight), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "count", "places", "hidden", "inner", "reciprocal"),
    [(37, 5, 3, 64, 48, False), (3, 4, 4, 80, 16, True), (1, 2, 1, 32, 32, False), (45, 1, 1, 48, 64, False)],
)
def test_experts(tokens: int, count: int, places: int, hidden: int, inner: int, reciprocal: bool, dtype: Any) -> None:
    gate_up = random_matrices(count, 2 * inner, hidden, reciprocal=reciprocal)
    down = random_matrices(count, hidden, inner, reciprocal=reciprocal, seed=2)
    slots = random_slots(tokens, count, places, hidden, dtype)
    expected = reference.experts(*slots, gate_up, down)
    found = experts(*slots, gate_up, down, (SMALL, SMALL))
    assert_near(found, expected, BOUNDS[dtype])
    assert torch.equal(found, experts(*slots, gate_up, down, (SMALL, SMALL)))


def test_routes_that_count_nothing() -> None:
    gate_up, down = random_matrices(4, 96, 64), random_matrices(4, 64, 48, seed=2)
    hidden, index, weights = random_slots(21, 4, 3, 64, torch.float16)
    index[::3, 1] = 4  # to no expert
    index[5] = 4  # a token of none at all
    index[index == 2] = 3  # repeated experts, and one without tokens
    weights[::4, 0] = 0
    found = experts(hidden, index, weights, gate_up, down, (SMALL, SMALL))
    assert_near(found, reference.experts(hidden, index, weights, gate_up, down), BOUNDS[torch.float16])
    assert not found[5].any()


def test_a_token_does_not_leak_into_another() -> None:
    gate_up, down = random_matrices(2, 96, 64), random_matrices(2, 64, 48, seed=2)
    hidden, index, weights = random_slots(20, 2, 1, 64, torch.float16)
    clean = experts(hidden, index, weights, gate_up, down, (SMALL, SMALL))
    hidden[0] = float("inf")
    found = experts(hidden, index, weights, gate_up, down, (SMALL, SMALL))
    assert torch.equal(found[1:], clean[1:])
    assert not found[0].isfinite().all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down = random_matrices(3, 96, 64), random_matrices(3, 64, 48, seed=2)
    slots = random_slots(25, 3, 2, 64, torch.float16)
    whole = experts(*slots, gate_up, down, (SMALL, SMALL))
    monkeypatch.setattr(experts_room, "MOST_WORKSPACE_BYTES", 7 * 2 * (64 + 48) * 2)
    assert torch.equal(experts(*slots, gate_up, down, (SMALL, SMALL)), whole)


def test_no_tokens() -> None:
    gate_up, down = random_matrices(2, 96, 64), random_matrices(2, 64, 48, seed=2)
    slots = random_slots(1, 2, 2, 64, torch.float16)
    assert experts(*(part[:0] for part in slots), gate_up, down).shape == (0, 64)


def test_what_does_not_fit_is_refused() -> None:
    gate_up, down = random_matrices(2, 96, 64), random_matrices(2, 64, 48, seed=2)
    hidden, index, weights = random_slots(5, 2, 2, 64, torch.float32)
    with pytest.raises(ValueError, match="bfloat16 or float16 is needed"):
        experts(hidden, index, weights, gate_up, down, (SMALL, SMALL))
    with pytest.raises(ValueError, match="does not fit a weight of 64 columns"):
        experts(hidden[:, :48].half(), index, weights, gate_up, down, (SMALL, SMALL))
    with pytest.raises(ValueError, match="tiles of 16 tokens, the product of 32"):
        experts(hidden.half(), index, weights, gate_up, down, (SMALL, replace(SMALL, tokens=32)))


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no CUDA GPU")
@pytest.mark.parametrize("tokens", [65, 300, 2048])
def test_real_width_in_a_graph_on_the_gpu(tokens: int) -> None:
    gate_up, down = random_matrices(128, 1536, 2048), random_matrices(128, 2048, 768, seed=2)
    slots = random_slots(tokens, 128, 8, 2048, torch.bfloat16)
    expected = reference.experts(*slots, gate_up, down, dtype=torch.float32)
    found = experts(*slots, gate_up, down)
    assert_near(found, expected, BOUNDS[torch.bfloat16])
    assert_near(experts_unpacked_first(*slots, gate_up, down), expected, 0.008)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = experts(*slots, gate_up, down)
    graph.replay()
    assert torch.equal(replayed, found)
