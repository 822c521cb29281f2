"""Synthetic models: built as loading builds them, and nothing in them is zero, unset or wrong."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from omnifp4.benchmark.headers import imagine, shape_config
from omnifp4.benchmark.synthetic import make_model
from omnifp4.errors import OmniFP4Error
from omnifp4.runtime import load
from omnifp4.runtime.packed import NVFP4Linear, PackedExperts, PackedModule

CPU = torch.device("cpu")


def made(**changes: Any) -> Any:
    options: dict[str, Any] = {"packed": True, "parts": "all", "layers": None, "seed": 0, "device": CPU}
    return make_model("tiny", **(options | changes))


def described(model: Any) -> dict[str, tuple[Any, ...]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}


@pytest.mark.parametrize("packed", [True, False])
def test_it_is_what_loading_makes(packed: bool, tiny_omni: Path, tiny_artifact: Path) -> None:
    loaded, synthetic = load(tiny_artifact if packed else tiny_omni, device="cpu", progress=False), made(packed=packed)
    assert described(synthetic) == described(loaded)
    assert {type(module) for module in synthetic.modules()} == {type(module) for module in loaded.modules()}
    computed = {name for name, _ in loaded.named_buffers()} - {
        f"{path}.{name}"
        for path, module in loaded.named_modules()
        if isinstance(module, PackedModule)
        for name, _ in module.named_buffers()
    }
    assert any("inv_freq" in name for name in computed)
    theirs, ours = dict(loaded.named_buffers()), dict(synthetic.named_buffers())
    for name in computed:
        assert torch.equal(ours[name], theirs[name]), name


def test_every_weight_is_random_and_of_sane_size() -> None:
    model = made()
    for name, parameter in model.named_parameters():
        values = parameter.float()
        assert values.isfinite().all() and values.abs().max() > 0, name
        if values.numel() > 500:
            assert values.std() > 0, name
    linears = [module for module in model.modules() if isinstance(module, NVFP4Linear)]
    for linear in linears:
        assert float(linear.weight.float().std()) == pytest.approx(1 / sqrt(linear.in_features), rel=0.1)
        assert float(linear.weight.float().mean()) == pytest.approx(0, abs=0.1 / sqrt(linear.in_features))
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert len(experts) == 4
    for module in experts:
        down = module.backend.dequantize(module.down(1), torch.bfloat16).float()
        assert float(down.std()) == pytest.approx(1 / sqrt(module.intermediate_dim), rel=0.1)
        codes = torch.bincount(module.gate_up_packed.view(-1).int(), minlength=256)
        assert int(codes.min()) > 0.5 * float(codes.float().mean())


def test_the_seed_decides_the_weights() -> None:
    one, same, other = (dict(made(parts="text", seed=seed).state_dict()) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith(("packed", "weight")))


def test_parts_and_layers() -> None:
    text = made(parts="text", layers=2)
    assert len(text.thinker.get_decoder().layers) == 2
    assert not any("visual" in name or "audio_tower" in name for name, _ in text.named_parameters())
    assert not hasattr(text, "talker")
    thinker = made(parts="thinker")
    assert any("visual" in name for name, _ in thinker.named_parameters())
    assert not hasattr(thinker, "talker")


def test_headers_of_the_released_shape_are_the_artifacts() -> None:
    """The byte counts of the whole 35 B artifact, as `quantize` wrote it."""
    config = shape_config("qwen3-omni-30b-a3b", None)
    wide = imagine("x", config, packed=False).checkpoint
    packed = imagine("x", config, packed=True).checkpoint
    assert sum(entry.parameters for entry in wide.tensors.values()) == 35_259_818_545
    assert packed.weight_bytes == 27_542_775_650


@pytest.mark.parametrize(("name", "layers"), [("qwen9", None), ("tiny", 0)])
def test_refusals(name: str, layers: int | None) -> None:
    with pytest.raises(OmniFP4Error):
        shape_config(name, layers)
