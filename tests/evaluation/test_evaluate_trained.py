"""What the trained tiny model can do, and that the default recipe keeps it: the gate of the whole chain."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def trained_artifact(trained_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model quantized with the defaults."""
    from omnifp4 import quantize

    out = tmp_path_factory.mktemp("trained_artifact") / "out"
    quantize(trained_omni, out, threads=2)
    return out


def test_answers_survive_the_default_recipe(trained_omni: Path, trained_artifact: Path, tmp_path: Path) -> None:
    """Held-out samples of every task: nearly all right before, at most one answer in all lost."""
    from omnifp4 import evaluate

    found = evaluate(trained_artifact, against=trained_omni, cache=tmp_path, samples=6, speech=False)
    samples = sum(task.samples for task in found.tasks)
    assert {task.task for task in found.tasks} == {
        "picture digit", "spoken digit", "add two", "compare two", "arithmetic", "repeat",
    }  # fmt: skip
    assert samples >= 50
    assert sum(task.reference * task.samples for task in found.tasks) >= 0.95 * samples
    assert sum(task.lost - task.gained for task in found.tasks) <= 1
    for one in found.modalities:
        assert one.floor is not None
        assert one.floor.kl_mean.value < one.model.kl_mean.value < 0.05
        assert one.model.top1_agreement.value > 0.88
        assert 0.95 < one.model.perplexity_ratio.value < 1.05


def test_spoken_answers_are_understood(trained_omni: Path, trained_artifact: Path, tmp_path: Path) -> None:
    """By a classifier of real recordings, before and after."""
    from omnifp4 import evaluate

    speech = evaluate(trained_artifact, against=trained_omni, cache=tmp_path, samples=2, floor=False).speech
    assert speech is not None
    assert speech.recognition is not None
    assert speech.recognition.utterances == 4
    assert min(speech.recognition.reference, speech.recognition.model) >= 0.75
    assert speech.long_utterances == 2
    assert len(speech.drift) == 4
    assert 0.9 < speech.frames_ratio < 1.1
