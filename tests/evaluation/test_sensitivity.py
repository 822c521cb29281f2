"""The map of where FP4 hurts: its figures against ones that are worked out another way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import omnifp4
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


def test_a_second_run_takes_all_from_the_cache(
    drawn: SensitivityReceipt, tiny_omni: Path, tiny_artifact: Path, data: Path, cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded again")

    monkeypatch.setattr("omnifp4.runtime.load", unwanted)
    again = run_sensitivity(tiny_artifact, tiny_omni, settings(data, cache))
    assert again.rows == drawn.rows
    assert again.together == drawn.together


def test_an_interrupted_run_goes_on(tiny_omni: Path, tiny_artifact: Path, data: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, item: str) -> None:
        if "layer 2" in item:
            raise Stop

    chosen = settings(data, tmp_path, alone=False)
    with pytest.raises(Stop):
        run_sensitivity(tiny_artifact, tiny_omni, chosen, stop)
    seen: list[str] = []
    found = run_sensitivity(tiny_artifact, tiny_omni, chosen, lambda done, total, item: seen.append(item))
    assert "errors, layer 0" not in seen
    assert "errors, layer 3" in seen
    assert found.rows == run_sensitivity(tiny_artifact, tiny_omni, settings(data, None, alone=False)).rows


def test_errors_alone_need_no_whole_model(
    tiny_omni: Path, tiny_artifact: Path, data: Path, drawn: SensitivityReceipt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnifp4.evaluation.pair.free_bytes", lambda device: 1000)
    with pytest.raises(OmniFP4Error, match="--segmented"):
        run_sensitivity(tiny_artifact, tiny_omni, settings(data, None))
    found = run_sensitivity(tiny_artifact, tiny_omni, settings(data, None, alone=False))
    assert [row.output_error for row in found.rows] == [row.output_error for row in drawn.rows]
    assert found.together is None
    assert all(row.kl_mean is None for row in found.rows)
    assert "nothing was quantized alone" in found.notes[0]


def test_a_wide_model_has_no_map(tiny_omni: Path, data: Path) -> None:
    with pytest.raises(OmniFP4Error, match="is not in FP4"):
        run_sensitivity(tiny_omni, tiny_omni, settings(data, None))


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
    assert found.notes == ("talker and code2wav are not in this map: logits of text do not see them",)
