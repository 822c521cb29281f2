"""The map of where FP4 hurts: its figures against ones that are worked out another way."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import omnifp4
from omnifp4.checkpoint.folds import FOLDS_NAME, Fold, Folds
from omnifp4.errors import OmniFP4Error
from omnifp4.evaluation import SensitivitySettings, run_sensitivity
from omnifp4.receipt.quantization import QuantizationReceipt
from omnifp4.receipt.sensitivity import SensitivityReceipt, SensitivityRow

LINES = (
    {"id": "one", "messages": "Repeat the word seven.", "answer": "seven"},
    {"id": "two", "messages": "What is two and three, and why is that so?", "answer": "five"},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sensitivity_cache")


def settings(data: Path, cache: Path | None, *, alone: bool = True, dtype: str = "float32") -> SensitivitySettings:
    return SensitivitySettings(data, None, alone, "cpu", dtype, cache, 0)


@pytest.fixture(scope="module")
def drawn(tiny_omni: Path, tiny_artifact: Path, data: Path, cache: Path) -> SensitivityReceipt:
    before = torch.get_num_threads()
    found = run_sensitivity(tiny_artifact, tiny_omni, settings(data, cache))
    assert torch.get_num_threads() == before
    return found


def rows(found: SensitivityReceipt, level: str) -> list[SensitivityRow]:
    levels = {"component": (True, True), "layer": (False, True), "expert": (False, False)}
    return [row for row in found.rows if (row.layer is None, row.expert is None) == levels[level]]


def test_every_part_has_its_row(drawn: SensitivityReceipt) -> None:
    assert [row.component for row in rows(drawn, "component")] == ["thinker.attention", "thinker.experts"]
    assert len(rows(drawn, "layer")) == 8
    assert len(rows(drawn, "expert")) == 32
    assert sum(row.linears for row in rows(drawn, "component")) == 112
    assert {row.linears for row in rows(drawn, "expert")} == {3}
    assert drawn.recipe == "nvfp4"
    assert drawn.rule == "sweep"


def test_weight_errors_are_those_of_quantize(drawn: SensitivityReceipt, tiny_artifact: Path) -> None:
    receipt = QuantizationReceipt.model_validate_json((tiny_artifact / "omnifp4.json").read_text())
    for row in rows(drawn, "component"):
        expected = receipt.errors[row.component]
        assert row.linears == expected.linears
        assert row.weight_error == pytest.approx(expected.relative_squared_error, rel=1e-5)


def test_tokens_are_all_routed(drawn: SensitivityReceipt) -> None:
    experts = {row.layer: 0 for row in rows(drawn, "expert")}
    for row in rows(drawn, "expert"):
        assert row.tokens is not None
        experts[row.layer] += row.tokens
        assert (row.output_error is None) == (row.tokens == 0)
    assert set(experts.values()) == {experts[0]}
    attention = [row for row in rows(drawn, "layer") if row.component == "thinker.attention"]
    # Four linears a layer see each token once, and two of eight experts do.
    assert {row.tokens for row in attention} == {2 * experts[0]}


def test_output_errors_are_near_those_of_random_inputs(drawn: SensitivityReceipt) -> None:
    for row in drawn.rows:
        if row.output_error is not None:
            assert 0.2 * row.weight_error < row.output_error < 20 * row.weight_error


def test_everything_at_once_is_what_evaluate_finds(
    drawn: SensitivityReceipt, tiny_omni: Path, tiny_artifact: Path, data: Path, cache: Path
) -> None:
    whole = omnifp4.evaluate(
        tiny_artifact, against=tiny_omni, data=data, cache=cache, dtype="float32", device="cpu", speech=False
    )
    assert drawn.together is not None
    assert drawn.together.value == pytest.approx(whole.modalities[0].model.kl_mean.value, rel=1e-6)
    floor = whole.modalities[0].floor
    assert floor is not None
    assert drawn.noise_floor == pytest.approx(floor.kl_mean.value)


def test_each_alone_is_above_the_floor_and_shares_make_one(drawn: SensitivityReceipt) -> None:
    for level in ("component", "layer"):
        found = rows(drawn, level)
        assert drawn.noise_floor is not None
        assert all(row.kl_mean is not None and row.kl_mean.value > drawn.noise_floor for row in found)
        assert sum(row.share or 0.0 for row in found) == pytest.approx(1)
    assert all(row.kl_mean is None for row in rows(drawn, "expert"))


class Stop(Exception):
    """As if the run had been killed."""


def stop_at(part: str) -> Any:
    def stop(done: int, total: int, item: str) -> None:
        if part in item:
            raise Stop

    return stop


def test_an_interrupted_run_takes_the_parts_that_it_had_done(
    drawn: SensitivityReceipt, tiny_omni: Path, tiny_artifact: Path, data: Path, tmp_path: Path
) -> None:
    chosen = settings(data, tmp_path)
    with pytest.raises(Stop):
        run_sensitivity(tiny_artifact, tiny_omni, chosen, stop_at("thinker.experts, layer 2"))
    seen: list[str] = []
    again = run_sensitivity(tiny_artifact, tiny_omni, chosen, lambda done, total, item: seen.append(item))
    assert not [item for item in seen if item.startswith(("reference", "errors, layer", "thinker.attention"))]
    assert [item for item in seen if item.startswith("thinker.experts, layer 3")]
    assert again.rows == drawn.rows
    assert again.together == drawn.together
    # What is done is not kept but for the reference: another day's kernels may give other numbers.
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"reference"}


def test_interrupted_errors_go_on(tiny_omni: Path, tiny_artifact: Path, data: Path, tmp_path: Path) -> None:
    chosen = settings(data, tmp_path, alone=False)
    with pytest.raises(Stop):
        run_sensitivity(tiny_artifact, tiny_omni, chosen, stop_at("layer 2"))
    seen: list[str] = []
    found = run_sensitivity(tiny_artifact, tiny_omni, chosen, lambda done, total, item: seen.append(item))
    assert "errors, layer 0" not in seen
    assert "errors, layer 3" in seen
    assert found.rows == run_sensitivity(tiny_artifact, tiny_omni, settings(data, None, alone=False)).rows


def test_errors_alone_need_no_whole_model(
    tiny_omni: Path, tiny_artifact: Path, data: Path, drawn: SensitivityReceipt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnifp4.evaluation.sensitivity.free_bytes", lambda device: 1000)
    with pytest.raises(OmniFP4Error, match=r"both are needed at once, and cpu has 0\.0 GB free \(--segmented"):
        run_sensitivity(tiny_artifact, tiny_omni, settings(data, None))
    found = run_sensitivity(tiny_artifact, tiny_omni, settings(data, None, alone=False))
    assert [row.output_error for row in found.rows] == [row.output_error for row in drawn.rows]
    assert found.together is None
    assert all(row.kl_mean is None for row in found.rows)
    assert "nothing was quantized alone" in found.notes[0]


def test_each_expert_alone(
    drawn: SensitivityReceipt, tiny_omni: Path, tiny_artifact: Path, data: Path, cache: Path
) -> None:
    found = run_sensitivity(tiny_artifact, tiny_omni, replace(settings(data, cache), experts=True))
    experts, plain = rows(found, "expert"), rows(drawn, "expert")
    assert [row.output_error for row in experts] == [row.output_error for row in plain]
    assert rows(found, "layer") == rows(drawn, "layer")
    assert all((row.kl_mean is None) == (row.tokens == 0) for row in experts)
    measured = [row for row in experts if row.kl_mean is not None]
    assert sum(row.share or 0.0 for row in measured) == pytest.approx(1)
    assert found.notes == ()
    assert drawn.notes == (f"no expert was quantized alone: --each-expert runs the model {len(measured)} more times",)
    assert found.noise_floor is not None
    # What a single token went through may be at a position that nothing scored can see.
    seen = [row for row in measured if (row.tokens or 0) > 2]
    assert len(seen) > 20
    assert all(row.kl_mean and row.kl_mean.value > found.noise_floor for row in seen)
    # A layer's experts together cost about what they cost one by one: the errors are small and come from other weights.
    for layer in rows(found, "layer"):
        if layer.component == "thinker.experts":
            assert layer.kl_mean is not None
            alone = sum(row.kl_mean.value for row in measured if row.layer == layer.layer and row.kl_mean)
            assert 0.2 < alone / layer.kl_mean.value < 5


def test_the_wide_model_is_as_before_after_its_experts_were_swapped(tiny_omni: Path, tiny_artifact: Path) -> None:
    from omnifp4.evaluation.fp4_units import Member
    from omnifp4.evaluation.sensitivity import _swapped_expert

    wide, packed = (
        omnifp4.load(path, speech=False, device="cpu", progress=False) for path in (tiny_omni, tiny_artifact)
    )
    path = next(
        name
        for name, _ in wide.named_modules()
        if name.startswith("thinker.") and name.endswith("layers.1.mlp.experts")
    )
    experts = wide.get_submodule(path)
    before = [value.clone() for value in experts.parameters()]
    member = Member("", path, "thinker.experts", 1, 3, 0)
    with _swapped_expert(wide, packed, member, 3):
        changed = [
            (value != kept).flatten(1).any(dim=1).nonzero().flatten().tolist()
            for value, kept in zip(experts.parameters(), before, strict=True)
        ]
        assert changed == [[3], [3]]
    assert all(torch.equal(value, kept) for value, kept in zip(experts.parameters(), before, strict=True))


def test_experts_alone_need_whole_models(tiny_omni: Path, tiny_artifact: Path, data: Path) -> None:
    with pytest.raises(OmniFP4Error, match=r"leave --segmented or --each-expert out"):
        run_sensitivity(tiny_artifact, tiny_omni, replace(settings(data, None, alone=False), experts=True))


def test_a_wide_model_has_no_map(tiny_omni: Path, data: Path) -> None:
    with pytest.raises(OmniFP4Error, match="is not in FP4"):
        run_sensitivity(tiny_omni, tiny_omni, settings(data, None))


def test_other_schemes_have_their_map_too(tiny_omni: Path, tmp_path: Path, data: Path) -> None:
    artifact = tmp_path / "mixed"
    made = omnifp4.quantize(
        tiny_omni, artifact, components=["thinker.experts=fp8", "thinker.attention=int8"], threads=2,
        format="compressed-tensors",
    )  # fmt: skip
    found = run_sensitivity(artifact, tiny_omni, replace(settings(data, None), experts=True))
    by_name = {row.component: row for row in rows(found, "component")}
    assert set(by_name) == {"thinker.experts", "thinker.attention"}
    for name, row in by_name.items():
        assert row.weight_error == pytest.approx(made.errors[name].relative_squared_error, rel=0.02)
        assert row.output_error is not None
        assert 0.1 < row.output_error / row.weight_error < 20
        assert row.kl_mean is not None
        assert found.noise_floor is not None
        assert row.kl_mean.value > found.noise_floor
    assert sum(row.parameters for row in rows(found, "expert")) == by_name["thinker.experts"].parameters
    assert any(row.kl_mean for row in rows(found, "expert"))


def test_folded_factors_have_no_map(tiny_omni: Path, tiny_artifact: Path, tmp_path: Path, data: Path) -> None:
    artifact = shutil.copytree(tiny_artifact, tmp_path / "folded")
    folds = Folds()
    folds.add(Fold("thinker.model.layers.0.input_layernorm.weight", (), (), np.ones(128, np.int8)))
    (artifact / FOLDS_NAME).write_text(json.dumps(folds.to_json()))
    with pytest.raises(
        OmniFP4Error, match=r"1 sets of factors were folded into it, .* \(evaluate without --sensitivity"
    ):
        run_sensitivity(artifact, tiny_omni, settings(data, None))


def test_towers_and_head_get_their_rows(tiny_omni: Path, tmp_path: Path, data: Path) -> None:
    artifact = tmp_path / "towers"
    components = ["audio_tower=nvfp4", "vision_tower=nvfp4", "talker.experts=nvfp4"]
    made = omnifp4.quantize(tiny_omni, artifact, recipe="nvfp4-mlp", components=components, threads=2)
    found = run_sensitivity(artifact, tiny_omni, settings(data, None))
    by_name = {row.component: row for row in rows(found, "component")}
    assert set(by_name) == {"audio_tower", "vision_tower", "thinker.experts"}
    for name, row in by_name.items():
        assert row.weight_error == pytest.approx(made.errors[name].relative_squared_error, rel=1e-5)
    # Text goes through no tower, so a tower in FP4 changes nothing, and no output of it is seen.
    assert by_name["audio_tower"].kl_mean is not None
    assert by_name["audio_tower"].kl_mean.value < 1e-9
    assert by_name["audio_tower"].output_error is None
    assert found.notes[0] == "talker and code2wav are not in this map: logits of text do not see them"
