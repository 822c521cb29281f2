"""The search for what speech bears: rounding in memory is quantize's, limits by hand, and a whole search."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omnifp4.errors import OmniFP4Error
from omnifp4.formats.scheme import Scheme
from omnifp4.quantization.recipe import read_recipe
from omnifp4.receipt.evaluation import Estimate, Recognition, SpeechFloor
from omnifp4.receipt.speech_search import SpeechTrial

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omnifp4.evaluation.speech_search import _Search, exceeded, stored_bytes  # noqa: E402


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value)


def speech(
    first: float = 1e-5, later: float | None = 1e-5, drift: tuple[float, ...] = (1e-5, 2e-5), lost: float = 0.0,
    frames: float = 1.0, non_finite: int = 0,
) -> SpeechFloor:  # fmt: skip
    change = Estimate(value=-lost, low=-lost - 0.1, high=-lost + 0.1)
    return SpeechFloor(
        code_agreement=estimate(0.9), first_code_agreement=estimate(0.9), code_kl_mean=estimate(first),
        later_code_kl_mean=None if later is None else estimate(later), drift=tuple(map(estimate, drift)),
        frames_ratio=frames, recognition=Recognition(utterances=20, reference=1, model=1 - lost, difference=change),
        non_finite=non_finite,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        (speech(), []),
        (speech(first=1e-4, later=1e-4, drift=(2e-4, 2e-4)), []),
        (speech(first=1.01e-4), ["KL of the first codes is 10.1 times the floor's"]),
        (speech(later=2e-4), ["KL of the later codes is 20 times the floor's"]),
        (speech(drift=(1e-5, 3e-4)), ["KL in quarter 2 of long speech is 15 times the floor's"]),
        (speech(later=None), []),
        (speech(lost=0.05), []),
        (speech(lost=0.2), ["20.0% of the digits are no longer understood"]),
        (speech(frames=1.2, non_finite=2), ["it is 1.2 times as long", "2 utterances are not finite"]),
    ],
)
def test_limits_are_multiples_of_the_floor(figures: SpeechFloor, told: list[str]) -> None:
    assert list(exceeded(figures, speech(), 10.0)) == told


def test_a_floor_of_nothing_bears_nothing() -> None:
    quiet = speech(first=0, later=0, drift=(0, 0))
    assert list(exceeded(quiet, quiet, 10.0)) == []
    assert len(list(exceeded(speech(), quiet, 10.0))) == 4


@pytest.fixture(scope="module")
def loaded(tiny_omni: Path) -> Any:
    """The wide model, its source, a reader and a rounder."""
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.checkpoint.reader import CheckpointReader
    from omnifp4.evaluation.speech_rounding import Rounder
    from omnifp4.formats.nvfp4 import ScaleRule
    from omnifp4.models.source import match_source
    from omnifp4.runtime import load

    checkpoint = open_checkpoint(tiny_omni)
    source = match_source(checkpoint)
    model = load(tiny_omni, device="cpu", dtype=torch.bfloat16, speech=True, progress=False)
    with CheckpointReader(checkpoint) as reader:
        rounder = Rounder(model, source, reader, ScaleRule.SWEEP)
        yield SimpleNamespace(model=model, source=source, reader=reader, rounder=rounder)


def test_values_are_those_of_fake_quant_and_are_put_back(tiny_omni: Path, loaded: Any, tmp_path: Path) -> None:
    import omnifp4
    from omnifp4.evaluation.speech_rounding import SPEAKING, groups_of
    from omnifp4.models.base import Part
    from omnifp4.runtime import load

    wanted = {
        "thinker.experts": "nvfp4", "talker.attention": "nvfp4", "talker.experts": "fp8", "talker.shared_experts": "int8",
        "talker.head": "mxfp4", "code_predictor": "nvfp4",
    }  # fmt: skip
    components = [f"{name}={scheme}" for name, scheme in wanted.items()]
    recipe = tmp_path / "nothing.json"
    recipe.write_text(json.dumps({"name": "nothing", "version": 1, "components": {}}))
    omnifp4.quantize(
        tiny_omni, tmp_path / "fake", recipe=str(recipe), components=components, format="fake-quant", threads=2
    )
    fake = load(tmp_path / "fake", device="cpu", dtype=torch.bfloat16, speech=True, progress=False).state_dict()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    groups = groups_of(loaded.source, (Part.THINKER, *SPEAKING))
    schemes = {group: Scheme(wanted[group.name]) for group in groups if group.name in wanted}
    assert {group.name for group in schemes} == set(wanted)
    with loaded.rounder.rounded(schemes):
        rounded = loaded.model.state_dict()
        assert [name for name in fake if not torch.equal(fake[name], rounded[name])] == []
        assert any(not torch.equal(before[name], rounded[name]) for name in before)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    with pytest.raises(RuntimeError, match="in the middle"), loaded.rounder.rounded(schemes):
        raise RuntimeError("in the middle")
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_bytes_are_those_of_a_plan(tiny_omni: Path, loaded: Any) -> None:
    import omnifp4
    from omnifp4.evaluation.speech_rounding import SPEAKING, groups_of

    plan = omnifp4.plan(
        tiny_omni, components=["talker.experts=fp8", "talker.attention=nvfp4"], format="compressed-tensors"
    )
    rows = {row.name: row.bytes_after for row in plan.components}
    groups = {group.name: group for group in groups_of(loaded.source, SPEAKING)}
    assert stored_bytes(groups["talker.experts"], Scheme.FP8) == rows["talker.experts"]
    assert stored_bytes(groups["talker.attention"], Scheme.NVFP4) == rows["talker.attention"]


def test_what_adds_up_to_too_much_is_widened_from_the_worst() -> None:
    """Two components bear NVFP4 alone; together they do not, and the one that does more has to give way."""
    search: Any = object.__new__(_Search)
    search.floor, search.settings, search.runs = speech(), SimpleNamespace(times_floor=10.0), 0
    search.schemes = [Scheme.NVFP4, Scheme.FP8]
    search.groups = ("much", "little", "no")
    damage = {("much", "nvfp4"): 9e-5, ("much", "fp8"): 1e-5, ("little", "nvfp4"): 3e-5, ("little", "fp8"): 1e-6}

    def trial(name: str, schemes: dict[Any, Scheme]) -> SpeechTrial:
        total = sum(damage.get((group, scheme.value), 1.0) for group, scheme in schemes.items())
        figures = speech(first=total)
        return SpeechTrial(
            name=name, schemes={str(group): scheme.value for group, scheme in schemes.items()}, parameters=1, bytes_before=2,
            bytes_after=1, speech=figures, exceeds=tuple(exceeded(figures, search.floor, 10.0)),
        )  # fmt: skip

    search._trial = trial
    trials = {(group, scheme): trial(group, {group: scheme}) for group in search.groups for scheme in search.schemes}
    tried, chosen = search._together(trials)
    assert [one.schemes for one in tried] == [{"much": "nvfp4", "little": "nvfp4"}, {"much": "fp8", "little": "nvfp4"}]
    assert [bool(one.exceeds) for one in tried] == [True, False]
    assert chosen == {"much": Scheme.FP8, "little": Scheme.NVFP4}


def test_a_search_makes_a_recipe_that_quantize_takes(tiny_omni: Path, few: Path, tmp_path: Path) -> None:
    """Untrained speech says nothing, so its limits are set wide; a second search with none bears nothing."""
    import omnifp4

    found = omnifp4.speech_recipe(tiny_omni, data=few, schemes=["fp8"], times_floor=1e9, name="mine", device="cpu", cache=tmp_path / "cache")  # fmt: skip
    names = [trial.name for trial in found.trials]
    assert names == [
        "talker.projections", "talker.attention", "talker.experts", "talker.shared_experts", "talker.head", "code_predictor",
    ]  # fmt: skip
    assert found.utterances == 1
    assert found.floor.later_code_kl_mean is not None
    # The first code of a frame is the talker's: the code predictor does not change it, all before it given.
    of = {trial.name: trial.speech for trial in found.trials}
    assert of["code_predictor"].code_kl_mean.value < 1e-9 < of["talker.experts"].code_kl_mean.value
    assert of["talker.head"].later_code_kl_mean.value < 1e-9 < of["code_predictor"].later_code_kl_mean.value  # type: ignore[union-attr]
    assert found.base_alone.schemes == {"thinker.attention": "nvfp4", "thinker.experts": "nvfp4"}
    assert found.together[-1].exceeds == ()
    assert found.with_base is not None
    assert not list((tmp_path / "cache").glob("speech-search-*")), "what depends on kernels is not kept"
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(found.recipe))
    assert read_recipe(path).components == {
        "thinker.experts": Scheme.NVFP4, "thinker.attention": Scheme.NVFP4, "thinker.mlp": Scheme.NVFP4,
        "thinker.shared_experts": Scheme.NVFP4, **dict.fromkeys(found.chosen, Scheme.FP8),
    }  # fmt: skip
    plan = omnifp4.plan(tiny_omni, recipe=str(path))
    assert {row.name: row.scheme for row in plan.components}["talker.experts"] == "fp8"


@pytest.mark.parametrize("output_format", ["modelopt", "compressed-tensors"])
def test_the_bundled_recipe_goes_all_the_way(
    output_format: str, tiny_omni: Path, few: Path, cache: Path, tmp_path: Path
) -> None:
    """Quantize, verify, load and evaluate, speech too, with two schemes in one model."""
    import omnifp4
    from omnifp4.receipt.base import Verdict

    artifact = tmp_path / "artifact"
    omnifp4.quantize(tiny_omni, artifact, recipe="nvfp4-speech", format=output_format, threads=2)
    assert omnifp4.verify(artifact, against=tiny_omni).verdict is Verdict.PASS
    found = omnifp4.evaluate(artifact, against=tiny_omni, data=few, cache=cache, floor=False)
    assert found.speech is not None
    assert found.speech.non_finite == 0
    assert found.speech.code_kl_mean.value > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"times_floor": 0.0}, "--times-floor is 0"),
        ({"schemes": ["bf16"]}, "all narrower than bf16"),
        ({"schemes": ["int4"]}, "scheme 'int4' is unknown"),
        ({"base": "nvfp4-thinker-talker"}, "says what happens to the talker"),
        ({"base": "nvfp4-gptq"}, "looks at inputs, and a search rounds without them"),
        ({"name": "nvfp4-speech"}, "that of a bundled recipe"),
        ({"name": "n" * 81}, "has 81 characters"),
        ({"data": "silent"}, "no sample is to be spoken"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    options: dict[str, Any], told: str, tiny_omni: Path, tmp_path: Path
) -> None:
    import omnifp4

    if options.get("data") == "silent":
        (tmp_path / "silent.jsonl").write_text(json.dumps({"messages": "Hello", "answer": "Hi"}) + "\n")
        options = {"data": tmp_path / "silent.jsonl"}
    with pytest.raises(OmniFP4Error, match=told):
        omnifp4.speech_recipe(tiny_omni, device="cpu", **options)


def test_the_command_refuses_before_it_loads(tiny_omni: Path, tmp_path: Path) -> None:
    from omnifp4.cli.speech_recipe import speech_recipe

    (tmp_path / "there.json").write_text("{}")
    for name, told in (("recipe.txt", r"ends in \.json"), ("there.json", "exists"), ("no/such.json", "is no folder")):
        with pytest.raises(OmniFP4Error, match=told):
            speech_recipe(str(tiny_omni), tmp_path / name)
    with pytest.raises(OmniFP4Error, match="the recipe's own file"):
        speech_recipe(str(tiny_omni), tmp_path / "mine.json", receipt=tmp_path / "mine.json")
