"""Whole evaluations of the tiny model: figures that make sense, the cache, segments, resuming, layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omnifp4 import evaluate  # noqa: E402
from omnifp4.errors import OmniFP4Error  # noqa: E402
from omnifp4.receipt.base import Verdict  # noqa: E402
from omnifp4.receipt.evaluation import EvaluationReceipt  # noqa: E402


def test_figures_of_every_modality(receipt: Any) -> None:
    assert [one.modality for one in receipt.modalities] == ["text", "image", "audio", "mixed"]
    for one in receipt.modalities:
        assert one.model.kl_mean.value > one.floor.kl_mean.value > 0
        assert one.model.kl_median <= one.model.kl_p90 <= one.model.kl_p99 <= one.model.kl_max
        assert one.model.non_finite == 0
    assert [task.task for task in receipt.tasks] == ["picture digit", "spoken digit", "add two"]
    assert receipt.verdict is Verdict.NOT_CHECKED
    assert EvaluationReceipt.model_validate_json(receipt.model_dump_json()) == receipt


def test_speech(receipt: Any) -> None:
    speech = receipt.speech
    assert speech.utterances == 1
    assert 0 < speech.frames <= 36
    assert 0 <= speech.code_agreement.value <= speech.first_code_agreement.value <= 1
    assert speech.code_kl_mean.value > 0
    assert speech.non_finite == 0


def test_a_model_against_itself(tiny_omni: Path, few: Path, cache: Path, receipt: Any) -> None:
    """No divergence, every speech code the same; the reference comes from the cache of the run before."""
    same = evaluate(tiny_omni, against=tiny_omni, data=few, cache=cache, max_kl=1e-6, min_top1=1, min_code_agreement=1)
    assert same.reference_cached == receipt.samples
    assert same.verdict is Verdict.PASS
    assert len(same.gates) == 3
    assert same.speech.code_agreement.value == same.speech.first_code_agreement.value == 1
    assert same.modalities[0].floor == receipt.modalities[0].floor


def test_segments_give_the_same_receipt(
    tiny_omni: Path, tiny_artifact: Path, few: Path, tmp_path: Path, receipt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides layer by layer, which the whole run's figures must equal to the last bit."""
    from omnifp4.evaluation import run

    monkeypatch.setattr(run, "fits", lambda *_, **__: False)
    found = evaluate(tiny_artifact, against=tiny_omni, data=few, cache=tmp_path, segmented=True)
    assert found.segmented == ("reference", "model")
    assert found.modalities == receipt.modalities
    assert found.tasks == receipt.tasks
    assert found.speech is None
    assert any("talker needs the whole model" in note for note in found.notes)
    assert not list(tmp_path.glob("states-*")), "hidden states are needed no more"


def test_it_goes_on_after_it_was_killed(
    tiny_omni: Path, tiny_artifact: Path, few: Path, tmp_path: Path, receipt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omnifp4.evaluation import scoring

    compare = scoring.compare
    calls = 0

    def killed(*values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return compare(*values)

    monkeypatch.setattr(scoring, "compare", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_artifact, against=tiny_omni, data=few, cache=tmp_path, speech=False)
    monkeypatch.setattr(scoring, "compare", compare)
    found = evaluate(tiny_artifact, against=tiny_omni, data=few, cache=tmp_path, speech=False)
    assert found.reference_cached == 2
    assert found.modalities == receipt.modalities


def test_layers(tiny_omni: Path, tiny_artifact: Path, few: Path, cache: Path) -> None:
    found = evaluate(tiny_artifact, against=tiny_omni, data=few, cache=cache, layers=2)
    assert [one.layer for one in found.layers] == [0, 1]
    for one in found.layers:
        assert 0 < one.floor < one.relative_error < 1
        assert 0.5 < one.cosine < 1
        assert 0.2 < one.routing_agreement < 1
    same = evaluate(tiny_omni, against=tiny_omni, data=few, cache=cache, layers=1, floor=False)
    assert (same.layers[0].relative_error, same.layers[0].routing_agreement) == (0, 1)


def test_greedy_answers_are_those_that_count_as_right(
    tiny_omni: Path, few: Path, tmp_path: Path, write_data: Any
) -> None:
    """The model's own greedy answer, given as the known one, is right; the same with one letter more is not."""
    from omnifp4 import OmniChat

    answer = OmniChat(tiny_omni, speech=False).ask("Say it", max_new_tokens=4, temperature=0.0).text
    line = {"messages": "Say it", "task": "own", "answer": answer}
    data = write_data({**line, "id": "a"}, {**line, "id": "b", "answer": answer + "x"})
    found = evaluate(tiny_omni, against=tiny_omni, data=data, cache=tmp_path, speech=False, floor=False)
    # Cut at four tokens, it goes on where the known answer ends: what comes before the end is judged by hand.
    from omnifp4.evaluation.data import read_data
    from omnifp4.evaluation.encoding import encode
    from omnifp4.evaluation.pair import open_pair

    pair = open_pair(tiny_omni, tiny_omni)
    first = encode(read_data(data)[0], pair.processor, pair.config)
    assert first.targets[-1] == pair.config.im_end_token_id
    assert found.tasks[0].samples == 2
    assert found.tasks[0].reference == found.tasks[0].model == 0


def test_gates_break(tiny_omni: Path, tiny_artifact: Path, few: Path, cache: Path, receipt: Any) -> None:
    found = evaluate(tiny_artifact, against=tiny_omni, data=few, cache=cache, speech=False, max_kl=1e-9)
    (gate,) = found.gates
    assert (gate.option, gate.verdict, found.verdict) == ("--max-kl", Verdict.FAIL, Verdict.FAIL)
    assert gate.value == max(one.model.kl_mean.value for one in receipt.modalities)


class Broken:
    """Breaks the logits of some samples: ``compare`` sees the reference's five first, then the model's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, calls: set[int], positions: slice) -> None:
        from omnifp4.evaluation import scoring

        self.inner, self.calls, self.positions, self.count = getattr(scoring, name), calls, positions, 0
        monkeypatch.setattr(scoring, name, self)

    def __call__(self, *values: Any) -> Any:
        self.count += 1
        if self.count not in self.calls:
            return self.inner(*values)
        *before, logits, targets = values
        logits = logits.clone()
        logits[self.positions, 3] = float("nan")
        return self.inner(*before, logits, targets)


def test_a_reference_with_nan_logits(tiny_omni: Path, few: Path, tmp_path: Path, monkeypatch: Any) -> None:
    Broken(monkeypatch, "summarise", {1}, slice(2, 3))
    with pytest.raises(OmniFP4Error, match="reference's logits of sample 'read' are not finite at 1 of"):
        evaluate(tiny_omni, against=tiny_omni, data=few, cache=tmp_path, speech=False, floor=False)


def test_a_modality_without_one_number(tiny_omni: Path, few: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The picture's logits alone are broken, as by a damaged tower."""
    Broken(monkeypatch, "compare", {8}, slice(None))
    with pytest.raises(OmniFP4Error, match="not finite at any of 2 positions of image: its weights are damaged"):
        evaluate(tiny_omni, against=tiny_omni, data=few, cache=tmp_path, speech=False, floor=False)


def test_some_nan_logits_are_counted_and_fail(tiny_omni: Path, few: Path, tmp_path: Path, monkeypatch: Any) -> None:
    Broken(monkeypatch, "compare", {6}, slice(1, 3))
    found = evaluate(tiny_omni, against=tiny_omni, data=few, cache=tmp_path, speech=False, floor=False)
    assert [one.model.non_finite for one in found.modalities] == [2, 0, 0, 0]
    assert (found.gates[0].option, found.gates[0].value, found.gates[0].where) == ("non-finite positions", 2, "text")
    assert found.verdict is Verdict.FAIL
    assert found.modalities[0].model.kl_mean.value < 1e-6
    assert EvaluationReceipt.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("everywhere", [False, True])
def test_layers_that_are_not_finite(
    tiny_omni: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everywhere: bool
) -> None:
    from omnifp4.evaluation import layers

    add = layers._Sums.add
    count = 0

    def broken(self: Any, mine: Any, theirs: Any) -> None:
        nonlocal count
        count += 1
        mine = mine.clone()
        if everywhere or count == 1:
            mine[..., 0] = float("inf")
        add(self, mine, theirs)

    monkeypatch.setattr(layers._Sums, "add", broken)
    run = {"against": tiny_omni, "data": few, "cache": tmp_path, "layers": 1, "floor": False}
    if everywhere:
        with pytest.raises(OmniFP4Error, match="not finite at any position after layer 0"):
            evaluate(tiny_omni, **run)
        return
    (layer,) = evaluate(tiny_omni, **run).layers
    assert layer.non_finite > 0
    assert layer.relative_error == 0


def test_only_the_reference_is_kept(tiny_omni: Path, tiny_artifact: Path, few: Path, tmp_path: Path) -> None:
    """What the model gives may change with a kernel that no key knows, so it is run again each time."""
    evaluate(tiny_artifact, against=tiny_omni, data=few, cache=tmp_path, speech=False, floor=False)
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["reference"]
    # Other weights under the same names are another reference.
    import os
    import shutil

    copy = shutil.copytree(tiny_omni, tmp_path / "copy")
    os.utime(copy / "model.safetensors", ns=(1, 1))
    found = evaluate(tiny_artifact, against=copy, data=few, cache=tmp_path, speech=False, floor=False)
    assert found.reference_cached == 0
