"""Every backend unpacks to the same bits, and the choice gives its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")

from omnifp4.errors import OmniFP4Error  # noqa: E402
from omnifp4.runtime import backends  # noqa: E402
from omnifp4.runtime.backends import BACKENDS, backend_for, choose_backend, why_not  # noqa: E402
from omnifp4.runtime.packed import PackedExperts, PackedWeight  # noqa: E402


def every_number(reciprocal: bool, tensor_scale: float) -> tuple[PackedWeight, Any]:
    """All codes under all finite positive block scales, and their values in float32."""
    from small_checkpoints import E4M3

    scales = np.arange(1, 127, dtype=np.uint8).reshape(-1, 1)
    codes = np.tile(np.arange(16, dtype=np.uint8), (len(scales), 1))
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    whole = np.float32(tensor_scale)
    factor = E4M3[scales] / whole if reciprocal else E4M3[scales] * whole
    values = np.concatenate([e2m1, -e2m1])[codes] * factor
    tensors = (torch.from_numpy(packed), torch.from_numpy(scales), torch.tensor(tensor_scale))
    return PackedWeight(*tensors, reciprocal), torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("reciprocal", "tensor_scale"), [(False, 2.0**-9), (False, 0.000389462), (True, 2234.18)])
@pytest.mark.parametrize("name", BACKENDS)
def test_unpacking(name: str, reciprocal: bool, tensor_scale: float, dtype: Any) -> None:
    if reason := why_not(name, torch.device("cpu")):
        pytest.skip(reason)
    weight, values = every_number(reciprocal, tensor_scale)
    found = BACKENDS[name]().dequantize(weight, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, values.to(dtype))


def random_experts(backend: str, experts: int = 5, hidden: int = 32, inner: int = 48) -> PackedExperts:
    class Wide(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.empty(experts, 2 * inner, hidden, device="meta"))
            self.down_proj = torch.nn.Parameter(torch.empty(experts, hidden, inner, device="meta"))
            self.act_fn = torch.nn.functional.silu

    module = PackedExperts(Wide(), backend, reciprocal=False, input_scale=False)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in module.named_buffers():
        if name.endswith("tensor_scale"):
            module._buffers[name] = torch.rand(buffer.shape, generator=generator) * 0.02 + 0.02
        else:
            low, high = (0x30, 0x40) if name.endswith("block_scale") else (0, 256)
            module._buffers[name] = torch.randint(low, high, buffer.shape, generator=generator, dtype=torch.uint8)
    return module


@pytest.mark.parametrize("name", BACKENDS)
def test_experts_are_transformers_eager_loop(name: str) -> None:
    """Also with slots routed to no expert, which Transformers 5.23 numbers behind the last one."""
    if reason := why_not(name, torch.device("cpu")):
        pytest.skip(reason)
    module = random_experts(name)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(13, 32, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(13)])
    weights = torch.rand(13, 3, generator=generator).bfloat16()
    reference = BACKENDS["torch"]()
    expected = torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        position, token = torch.where(index.t() == expert)
        gate_up = reference.dequantize(module.gate_up(expert), torch.bfloat16)
        gate, up = torch.nn.functional.linear(hidden[token], gate_up).chunk(2, dim=-1)
        down = reference.dequantize(module.down(expert), torch.bfloat16)
        output = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)
        expected.index_add_(0, token, output * weights[token, position, None])
    assert expected.abs().max() > 0.1
    assert torch.equal(module(hidden, index, weights), expected)


def test_only_routed_experts_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = random_experts("torch")
    backend = backend_for(torch.device("cpu"), "torch")
    seen: list[int] = []
    dequantize = type(backend).dequantize

    def watch(self: Any, weight: PackedWeight, dtype: Any) -> Any:
        seen.append(weight.packed.data_ptr())
        return dequantize(self, weight, dtype)

    monkeypatch.setattr(type(backend), "dequantize", watch)
    index = torch.tensor([[1, 3], [3, 1]])
    module(torch.ones(2, 32).bfloat16(), index, torch.ones(2, 2).bfloat16())
    expected = [part(expert).packed.data_ptr() for expert in (1, 3) for part in (module.gate_up, module.down)]
    assert seen == expected


def test_choice_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, reason = choose_backend("cpu", "torch")
    assert (backend.name, reason) == ("torch", "it was asked for")
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    assert choose_backend("cpu")[0].name == "compiled-cpu"
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    backend, reason = choose_backend("cpu")
    assert backend.name == "torch"
    assert "numba, which is not installed" in reason


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_a_request_never_falls_back(device: str) -> None:
    with pytest.raises(
        OmniFP4Error, match=f"backend 'compiled-cpu' cannot run on {device}: compiled-cpu reads host memory"
    ):
        choose_backend(device, "compiled-cpu")


def test_kernels_for_a_gpu_are_chosen_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    backend, reason = choose_backend("cuda")
    assert (backend.name, reason) == (
        "triton",
        "the weights are on a CUDA GPU, where Triton kernels read them packed",
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    backend, reason = choose_backend("cuda")
    assert backend.name == "torch"
    assert "compute capability 8.0" in reason
    with pytest.raises(OmniFP4Error, match="backend 'triton' cannot run on cpu: triton runs on a CUDA GPU, not on cpu"):
        choose_backend("cpu", "triton")
