"""Several artifacts in one run: paired differences, what they say, and the record of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import omnifp4
from omnifp4.cli import main
from omnifp4.errors import OmniFP4Error
from omnifp4.evaluation.comparison import check_models, worth
from omnifp4.evaluation.comparison_results import (
    bytes_told,
    conclusion,
    modality_differences,
    task_differences,
    together,
    told_apart,
)
from omnifp4.evaluation.data import Sample
from omnifp4.evaluation.distributions import Scores
from omnifp4.evaluation.statistics import paired_times, ratio_estimate
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.comparison import ComparisonReceipt, Finding, ModalityDifference
from omnifp4.receipt.evaluation import Estimate
from omnifp4.report.comparison import comparison_text


class Encoded:
    """What of an encoded sample the figures look at."""

    def __init__(self, number: int, modality: str = "text", task: str = "") -> None:
        self.sample = Sample(f"sample {number}", task, modality, (), None)


class NoFloors:
    """An evaluation without noise floors."""

    modalities: tuple[Any, ...] = ()
    speech = None


def scores(kl: Any, right: bool = True) -> Scores:
    values = np.asarray(kl, dtype=np.float64)
    finite = np.isfinite(values)
    agree = np.full(len(values), True)
    return Scores(values, agree, np.full(len(values), right), np.zeros(len(values)), finite)


def sides(count: int = 40) -> tuple[list[Any], list[Scores], list[Scores]]:
    """Samples that differ far more from each other than the second side from the first, which is a tenth nearer."""
    generator = np.random.default_rng(1)
    base = [generator.lognormal(0, 2) * np.ones(5) for _ in range(count)]
    return [Encoded(n) for n in range(count)], [scores(one) for one in base], [scores(0.9 * one) for one in base]


def test_pairs_tell_apart_what_intervals_side_by_side_do_not() -> None:
    samples, first, second = sides()
    counts = np.full(len(samples), 5.0)
    alone = [ratio_estimate(np.array([one.kl.sum() for one in side]), counts, seed=0) for side in (first, second)]
    assert alone[0].low < alone[1].value < alone[0].high
    (found,) = modality_differences(samples, first, second, NoFloors(), seed=0)  # type: ignore[arg-type]
    assert found.finding is Finding.NEARER
    assert found.kl_difference.high < 0
    assert found.kl_difference.value == pytest.approx(found.kl - found.baseline_kl)
    assert found.kl_times is not None
    # Each sample is a tenth nearer, so every draw of samples is.
    for times in (found.kl_times.value, found.kl_times.low, found.kl_times.high):
        assert times == pytest.approx(0.9)
    (back,) = modality_differences(samples, second, first, NoFloors(), seed=0)  # type: ignore[arg-type]
    assert back.finding is Finding.WORSE
    (same,) = modality_differences(samples, first, first, NoFloors(), seed=0)  # type: ignore[arg-type]
    assert (same.finding, same.kl_difference.value) == (Finding.SAME, 0)


def test_positions_that_one_side_lacks_count_on_neither() -> None:
    samples, first, second = sides(12)
    second[3] = scores([np.nan, 1.0, 1.0, 1.0, 1.0])
    second[4] = scores(np.full(5, np.nan))
    (found,) = modality_differences(samples, first, second, NoFloors(), seed=0)  # type: ignore[arg-type]
    assert (found.samples, found.positions) == (11, 54)
    kept = np.concatenate([one.kl[other.finite] for one, other in zip(first, second, strict=True)])
    assert found.baseline_kl == pytest.approx(kept.mean())
    broken = [scores(np.full(5, np.nan)) for _ in first]
    with pytest.raises(OmniFP4Error, match="no position of text has finite logits in both"):
        modality_differences(samples, first, broken, NoFloors(), seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "value", "high", "floor", "samples", "finding"),
    [
        (0.1, 0.2, 0.3, None, 40, Finding.WORSE),
        (-0.3, -0.2, -0.1, 0.01, 40, Finding.NEARER),
        (-0.3, -0.2, 0.1, 0.01, 40, Finding.SAME),
        (-0.3, -0.2, -0.1, 0.2, 40, Finding.SAME),
        (-0.3, -0.2, -0.1, 0.01, 9, Finding.TOO_FEW),
    ],
)
def test_what_counts_as_told_apart(
    low: float, value: float, high: float, floor: float | None, samples: int, finding: Finding
) -> None:
    assert told_apart(Estimate(value=value, low=low, high=high), floor, samples) is finding


def test_answers_are_compared_one_by_one() -> None:
    samples = [Encoded(n, task="digits") for n in range(60)]
    before = [scores([0.0], right=n >= 20) for n in range(60)]
    after = [scores([0.0], right=True) for _ in range(60)]
    (found,) = task_differences(samples, before, after)  # type: ignore[arg-type]
    assert (found.lost, found.gained, found.finding) == (0, 20, Finding.NEARER)
    assert found.difference.value == pytest.approx(1 / 3)
    (back,) = task_differences(samples, after, before)  # type: ignore[arg-type]
    assert (back.lost, back.finding) == (20, Finding.WORSE)
    (same,) = task_differences(samples, after, after)  # type: ignore[arg-type]
    assert same.finding is Finding.SAME
    assert same.difference.low < 0 < same.difference.high


def test_an_artifact_as_a_whole() -> None:
    nearer, worse, same, few = Finding.NEARER, Finding.WORSE, Finding.SAME, Finding.TOO_FEW
    assert together([same, nearer, few]) is nearer
    assert together([nearer, worse]) is Finding.MIXED
    assert together([same, worse]) is worse
    assert together([same, few]) is same
    assert together([few, few]) is few


def difference(finding: Finding, times: float) -> ModalityDifference:
    some = Estimate(value=times, low=times, high=times)
    return ModalityDifference(
        modality="audio", samples=40, positions=40, kl=times, baseline_kl=1.0, kl_difference=some, kl_times=some,
        top1_difference=some, floor=None, finding=finding,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("finding", "times", "more", "told"),
    [
        (Finding.NEARER, 0.25, 0.17, "worth it where the bytes are: KL 4.00x lower (audio), for 17.0 % more bytes"),
        (Finding.NEARER, 0.25, 0.0, "worth it: KL 4.00x lower (audio), for the same bytes"),
        (Finding.WORSE, 1.5, -0.1, "a trade: KL 1.50x higher (audio), for 10.0 % fewer bytes"),
        (Finding.WORSE, 1.5, 0.0, "not worth it: KL 1.50x higher (audio), for the same bytes"),
        (Finding.SAME, 1.0, 0.02, "not worth it: not distinguishable, for 2.0 % more bytes"),
        (Finding.SAME, 1.0, -0.02, "cheaper: not distinguishable, for 2.0 % fewer bytes"),
        (Finding.TOO_FEW, 1.0, 0.0, "not worth it: too few samples to tell them apart, for the same bytes"),
    ],
)
def test_what_is_said(finding: Finding, times: float, more: float, told: str) -> None:
    assert conclusion(finding, [difference(finding, times)], (), None, more) == told


def test_sizes_that_differ_by_headers_alone_are_the_same() -> None:
    assert bytes_told(0.0003) == "the same bytes"
    assert paired_times(np.ones(4), np.zeros(4), seed=0) is None


@pytest.fixture(scope="module")
def other(tiny_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second artifact of the same model: experts alone, so larger."""
    out = tmp_path_factory.mktemp("other") / "experts-alone"
    omnifp4.quantize(tiny_omni, out, recipe="nvfp4-mlp", threads=1)
    return out


@pytest.fixture(scope="module")
def compared(tiny_omni: Path, tiny_artifact: Path, other: Path, few: Path, cache: Path, receipt: Any) -> Any:
    """The default artifact and the larger one; `receipt` put the reference into the cache."""
    return omnifp4.compare([tiny_artifact, other], against=tiny_omni, data=few, cache=cache)


def test_each_evaluation_is_that_of_a_run_of_its_own(compared: Any, receipt: Any, tiny_omni: Path) -> None:
    own = compared.evaluations[0]
    for field in ("modalities", "tasks", "speech", "gates", "notes", "verdict", "segmented"):
        assert getattr(own, field) == getattr(receipt, field), field
    assert [one.reference_cached for one in compared.evaluations] == [receipt.samples] * 2
    assert compared.verdict is Verdict.NOT_CHECKED


def test_differences_are_those_of_the_evaluations(compared: Any, tiny_artifact: Path, other: Path) -> None:
    first, second = compared.artifacts
    assert (first.finding, first.conclusion, first.modalities) == (None, "the baseline", ())
    assert compared.baseline == str(tiny_artifact)
    assert (first.recipe, first.rule, second.recipe) == ("nvfp4", "sweep", "nvfp4-mlp")
    size = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (tiny_artifact, other)]
    assert [one.weight_bytes for one in compared.artifacts] == size
    assert second.more_bytes == pytest.approx(size[1] / size[0] - 1)
    assert 4.5 < first.bits_per_weight < second.bits_per_weight < 16
    for mine, before, after in zip(
        second.modalities, compared.evaluations[0].modalities, compared.evaluations[1].modalities, strict=True
    ):
        assert mine.kl_difference.value == pytest.approx(after.model.kl_mean.value - before.model.kl_mean.value)
        assert (mine.kl, mine.floor) == (pytest.approx(after.model.kl_mean.value), before.floor.kl_mean.value)
        assert mine.finding is Finding.TOO_FEW
    assert {one.task for one in second.tasks} == {"picture digit", "spoken digit", "add two", "speech understood"}
    agreed = [one.speech.code_agreement.value for one in compared.evaluations]
    assert second.speech.code_agreement.value == pytest.approx(agreed[1] - agreed[0])
    assert "nothing is nearer" in compared.worth
    assert "would leave zero out by chance" in compared.notes[0]


def test_another_baseline(
    compared: Any, tiny_omni: Path, tiny_artifact: Path, other: Path, few: Path, cache: Path
) -> None:
    back = omnifp4.compare(
        [tiny_artifact, other], against=tiny_omni, data=few, cache=cache, baseline=other, speech=False, floor=False
    )
    assert (back.baseline, back.artifacts[1].finding) == (str(other), None)
    for there, here in zip(compared.artifacts[1].modalities, back.artifacts[0].modalities, strict=True):
        assert here.kl_difference.value == pytest.approx(-there.kl_difference.value)
        assert here.floor is None
    assert back.artifacts[0].speech is None


def test_limits_are_set_to_each(
    compared: Any, tiny_omni: Path, tiny_artifact: Path, other: Path, few: Path, cache: Path
) -> None:
    worst = [max(item.model.kl_mean.value for item in one.modalities) for one in compared.evaluations]
    limit = sum(worst) / 2
    found = omnifp4.compare(
        [tiny_artifact, other], against=tiny_omni, data=few, cache=cache, speech=False, floor=False, max_kl=limit
    )
    assert found.verdict is Verdict.FAIL
    assert {one.verdict for one in found.artifacts} == {Verdict.FAIL, Verdict.PASS}
    (bad,) = [one for one in found.artifacts if one.verdict is Verdict.FAIL]
    assert bad.conclusion.endswith("; fails --max-kl")


def test_a_run_that_was_killed_goes_on_with_the_model_it_was_at(
    compared: Any, tiny_omni: Path, tiny_artifact: Path, other: Path, few: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, item: str) -> None:
        if item.startswith("model 2 of 2, loaded"):
            raise Stop

    options: dict[str, Any] = {"against": tiny_omni, "data": few, "cache": tmp_path, "speech": False}
    with pytest.raises(Stop):
        omnifp4.compare([tiny_artifact, other], progress=stop, **options)
    seen: list[str] = []
    found = omnifp4.compare([tiny_artifact, other], progress=lambda done, total, item: seen.append(item), **options)
    assert {item.partition(",")[0] for item in seen} == {"model 2 of 2"}
    assert [one.modalities for one in found.evaluations] == [one.modalities for one in compared.evaluations]
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"reference"}


def test_segments_give_the_same_figures(
    compared: Any, tiny_omni: Path, tiny_artifact: Path, other: Path, few: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Reference and both artifacts layer by layer from disk."""
    from omnifp4.evaluation import run

    monkeypatch.setattr(run, "fits", lambda *_, **__: False)
    found = omnifp4.compare([tiny_artifact, other], against=tiny_omni, data=few, cache=tmp_path, segmented=True)
    assert [one.segmented for one in found.evaluations] == [("reference", "model")] * 2
    assert [one.modalities for one in found.evaluations] == [one.modalities for one in compared.evaluations]
    assert found.artifacts[1].modalities == compared.artifacts[1].modalities
    assert found.artifacts[1].speech is None
    assert all("talker needs the whole model" in one.notes[0] for one in found.evaluations)
    assert not list(tmp_path.glob("states-*"))


def test_what_cannot_be_compared(tiny_omni: Path, tiny_artifact: Path, other: Path) -> None:
    with pytest.raises(OmniFP4Error, match="is given twice"):
        omnifp4.compare([tiny_artifact, str(tiny_artifact)], against=tiny_omni)
    with pytest.raises(OmniFP4Error, match=r"1 model to compare \(two or more"):
        omnifp4.compare([tiny_artifact], against=tiny_omni)
    with pytest.raises(OmniFP4Error, match="baseline 'best' is none of the models"):
        omnifp4.compare([tiny_artifact, other], against=tiny_omni, baseline="best")


def test_the_command(
    tiny_omni: Path, tiny_artifact: Path, other: Path, few: Path, cache: Path, tmp_path: Path, compared: Any,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omnifp4", "evaluate", str(tiny_artifact), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main.run()
        return int(end.value.code or 0), *capsys.readouterr()

    shared = ("--against", tiny_omni, "--data", few, "--cache", cache, "--no-speech", "--no-floor")
    status, shown, _ = command(other, *shared, "--receipt", tmp_path / "receipt.json")
    assert status == 0
    assert "experts-alone: not worth it: too few samples" in shown
    assert compared.worth in shown
    assert max(len(line) for line in shown.splitlines() if line.startswith(" ")) <= 80
    written = ComparisonReceipt.model_validate_json((tmp_path / "receipt.json").read_text())
    assert written.artifacts[1].modalities[0].kl == compared.artifacts[1].modalities[0].kl
    page = omnifp4.write_report([tmp_path / "receipt.json"], tmp_path / "report.html")
    assert page.comparison == written
    assert "Which artifact is worth it" in (tmp_path / "report.html").read_text()
    status, shown, _ = command(other, *shared, "--json", "--max-kl", 1e-9)
    assert (status, json.loads(shown)["receipt"]) == (1, "comparison")
    for arguments, told in (
        ((other, "--lm-eval", "x"), "--lm-eval judges one model, not 2"),
        ((other, "--sensitivity", "--against", tiny_omni), "--sensitivity judges one model, not 2"),
        ((other, "--against", tiny_omni, "--layers", 1), "--layers compares hidden states of one model"),
        (("--against", tiny_omni, "--baseline", other), "--baseline is for several models"),
        ((other, "--against", tiny_omni, "--baseline", "best"), "baseline 'best' is none of the models"),
    ):
        status, shown, talk = command(*arguments)
        assert (status, shown) == (2, "")
        assert told in talk
        assert talk.count("\n") == 1


def test_what_is_worth_it_is_said_in_one_sentence(compared: Any) -> None:
    base, one = compared.artifacts
    free = one.model_copy(update={"finding": Finding.NEARER, "more_bytes": 0.0, "model": "/x/free"})
    dear = one.model_copy(update={"finding": Finding.NEARER, "more_bytes": 0.2, "model": "/x/dear"})
    small = one.model_copy(update={"finding": Finding.SAME, "more_bytes": -0.2, "model": "/x/small"})
    broken = free.model_copy(update={"verdict": Verdict.FAIL, "model": "/x/broken"})
    assert worth([base, free, dear, small, broken], "/x/base") == (
        "worth it over base at no more bytes: free; nearer than base for more bytes: dear; "
        "smaller than base and not told apart from it: small; nearer than base in some respect, but failed: broken"
    )
    assert comparison_text(compared) is not None


def test_floors_and_signs_reach_the_findings() -> None:
    from types import SimpleNamespace

    from omnifp4.evaluation.comparison_results import speech_difference

    samples, first, second = sides()
    noise = SimpleNamespace(kl_mean=SimpleNamespace(value=1e6), code_kl_mean=SimpleNamespace(value=1e6))
    floors: Any = SimpleNamespace(
        modalities=(SimpleNamespace(modality="text", floor=noise),), speech=SimpleNamespace(floor=noise)
    )
    none: Any = NoFloors()
    for one in first:
        one.agrees[0] = False
    (found,) = modality_differences(samples, first, second, none, seed=0)
    assert found.top1_difference.value == pytest.approx(0.2)
    (found,) = modality_differences(samples, first, second, floors, seed=0)
    assert (found.floor, found.finding) == (1e6, Finding.SAME)
    utterance = SimpleNamespace(codes=np.ones((3, 4), dtype=np.int64))
    said: Any = [SimpleNamespace(utterance=utterance) for _ in samples]
    spoken: Any = [[SimpleNamespace(utterance=utterance, codes=one) for one in side] for side in (first, second)]
    speech = speech_difference(said, *spoken, none, seed=0)
    assert speech.code_kl.value < 0
    assert speech.finding is Finding.NEARER
    assert speech_difference(said, *spoken, floors, seed=0).finding is Finding.SAME


def test_names_that_tables_could_not_tell_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OmniFP4Error, match="two artifacts are named 'out'"):
        check_models([tmp_path / "a" / "out", tmp_path / "b" / "out"])
