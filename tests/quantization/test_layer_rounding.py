"""The rounding of a layer's linears, learned together: in one layer of the tiny model, and through quantize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import omnifp4
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.quantization import layer_rounding
from omnifp4.quantization.recipe import RECIPES, find_recipe

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")

SAMPLES = 4
MANY = 120
LAYER = "thinker.model.layers.1"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Two threads on matrices this small wait for each other for most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "set"
    omnifp4.dataset(out, samples=SAMPLES)
    return out


def test_a_layer_gives_nearly_what_it_gave_and_gets_its_weights_back(tiny_omni: Path, data: Path) -> None:
    from omnifp4.algorithms.grid import decode, encode, tensor_scales
    from omnifp4.calibration.hessians import visit_layers
    from omnifp4.quantization.inputs import VisitedInputs
    from omnifp4.quantization.layer_rounding import round_layer
    from omnifp4.quantization.rounding import Subject, scales_of

    recipe, found = find_recipe("nvfp4-signround"), dict[str, Any]()

    def visitor(name: str, layer: Any) -> None:
        if name != LAYER:
            return
        inputs = VisitedInputs(layer)
        before = {weight: layer.weight(weight).clone() for weight in layer.names}
        groups = [[Subject(weight, value.float().numpy())] for weight, value in before.items()]
        codes = round_layer(groups, recipe, ScaleRule.SWEEP, inputs, layer, steps=20)
        again = round_layer(groups, recipe, ScaleRule.SWEEP, inputs, layer, steps=20)
        assert all(torch.equal(one.codes, again[weight].codes) for weight, one in codes.items())
        assert all(torch.equal(layer.weight(weight), value) for weight, value in before.items())
        assert not any(parameter.requires_grad for parameter in layer.module.parameters())
        assert set(codes) == {weight for weight in before if inputs.source(weight) == "routed"} != set(before)
        assert len(layer.runs) == SAMPLES
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_rounding, "BATCH", 2)
            batches = layer_rounding._Layer(layer, [], 20, 0)._batches
        assert {number for batch in batches for number in batch} == set(range(SAMPLES)), "every sample has its turn"

        def error(values: dict[str, Any]) -> float:
            for weight, value in values.items():
                layer.weight(weight).copy_(value)
            total = 0.0
            for run in layer.runs:
                given = layer.module(run.before, **run.named)
                given = given[0] if isinstance(given, tuple) else given
                total += float((given.float() - run.given.float()).square().sum())
            for weight in values:
                layer.weight(weight).copy_(before[weight])
            return total

        nearest = {}
        for (subject,) in groups:
            if subject.name in codes:
                weight = torch.from_numpy(subject.weight)
                scale = tensor_scales(weight.abs().max(), ScaleRule.SWEEP)
                blocks = scales_of(subject, weight, scale, recipe, ScaleRule.SWEEP, inputs)
                nearest[subject.name] = decode(encode(weight, blocks, scale))
        found["nothing"] = error({})
        found["nearest"] = error(nearest)
        found["learned"] = error({weight: decode(one) for weight, one in codes.items()})

    # With so many tokens asked for, some experts have too few of their own.
    visit_layers(tiny_omni, data, visitor, device="cpu", runs=True, least_tokens=MANY)
    assert found["nothing"] == 0
    assert found["learned"] < 0.9 * found["nearest"]


def test_runs_are_kept_only_where_they_are_asked_for(tiny_omni: Path, data: Path) -> None:
    from omnifp4.calibration.hessians import visit_layers

    kept: list[int] = []
    visit_layers(tiny_omni, data, lambda name, layer: kept.append(len(layer.runs)), device="cpu")
    assert kept == [0, 0, 0, 0]


def recipe_file(path: Path, **method: Any) -> str:
    recipe = RECIPES["nvfp4-signround"].model_dump(mode="json")
    settings = {"name": "signround", "steps": 2, **method}
    path.write_text(json.dumps({**recipe, "name": "quick", "method": settings}))
    return str(path)


def test_no_memory_for_a_layer_is_the_form_by_the_linear(
    tiny_omni: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record says how many were learned together, so nothing falls back unseen."""

    whole, alone = (recipe_file(tmp_path / f"{name}.json", against=name) for name in ("layer", "linear"))
    settings: dict[str, Any] = {"data": data, "device": "cpu", "threads": 1}
    learned = omnifp4.quantize(tiny_omni, tmp_path / "whole", recipe=whole, **settings)
    by_linear = omnifp4.quantize(tiny_omni, tmp_path / "alone", recipe=alone, **settings)
    monkeypatch.setattr(layer_rounding, "available_bytes", lambda: 1_000_000)
    small = omnifp4.quantize(tiny_omni, tmp_path / "small", recipe=whole, **settings)
    assert learned.calibration is not None and by_linear.calibration is not None and small.calibration is not None
    assert learned.calibration.learned_together == learned.calibration.sources["routed"] > 0
    assert by_linear.calibration.learned_together == small.calibration.learned_together == 0
    assert small.tensors == by_linear.tensors != learned.tensors
