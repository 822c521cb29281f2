"""Packed loading, answers and speech on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runtime_artifacts import differing
from test_runtime_memory import held_bytes
from test_runtime_speech import heard, spoken

torch: Any = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
__all__ = ["heard"]


@pytest.fixture(scope="module")
def models(transformers: Any, artifact: Callable[..., Path]) -> tuple[Any, Any]:
    """The same artifact on CPU and GPU."""
    from omnifp4.runtime import load

    folder = artifact(recipe="nvfp4-thinker-talker", rule="max")
    return load(folder, device="cpu", progress=False), load(folder, device="cuda", progress=False)


def test_all_is_on_the_gpu_bit_by_bit(models: tuple[Any, Any]) -> None:
    host, device = (model.state_dict() for model in models)
    assert host.keys() == device.keys()
    for name, value in device.items():
        assert value.is_cuda, name
        assert torch.equal(value.cpu(), host[name]), name


def test_unpacked_values_are_those_of_the_cpu(models: tuple[Any, Any]) -> None:
    from omnifp4.runtime.packed import NVFP4Linear, PackedExperts

    for first, second in zip(models[0].modules(), models[1].modules(), strict=True):
        if isinstance(first, NVFP4Linear):
            assert torch.equal(first.weight, second.weight.cpu())
        if isinstance(first, PackedExperts):
            for part in ("gate_up", "down"):
                one, other = getattr(first, part)(1), getattr(second, part)(1)
                found = second.backend.dequantize(other, torch.bfloat16).cpu()
                assert torch.equal(found, first.backend.dequantize(one, torch.bfloat16))


def test_logits_are_those_of_the_cpu(models: tuple[Any, Any], tokens: Any) -> None:
    with torch.no_grad():
        host, device = (model.thinker(input_ids=tokens.to(model.device)).logits.float().cpu() for model in models)
    assert (host - device).norm() / host.norm() < 0.02


def test_it_speaks(models: tuple[Any, Any], heard: dict[str, Any]) -> None:
    _, waveform = spoken(models[1], {key: value.cuda() for key, value in heard.items()})
    assert waveform.isfinite().all()
    assert waveform.std() > 0.01


def test_saving_gives_the_checkpoint_back(
    models: tuple[Any, Any], artifact: Callable[..., Path], tmp_path: Path
) -> None:
    models[1].save_pretrained(tmp_path / "saved")
    assert not differing(artifact(recipe="nvfp4-thinker-talker", rule="max"), tmp_path / "saved")


def test_memory_is_the_packed_size(models: tuple[Any, Any], artifact: Callable[..., Path]) -> None:
    from omnifp4.runtime import load

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load(artifact(), device="cuda", progress=False)
    # The allocator rounds each of a few hundred tensors up to 512 bytes.
    assert torch.cuda.memory_allocated() - before < held_bytes(model) * 1.05
