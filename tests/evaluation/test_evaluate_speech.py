"""Speech: figures worked out by hand, the listener on real recordings, and the noise floor of a whole run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evaluation_data import SAMPLES

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omnifp4.evaluation.distributions import Scores  # noqa: E402
from omnifp4.evaluation.speech import SpokenReference, SpokenSide, Utterance  # noqa: E402
from omnifp4.evaluation.speech_results import is_digit, long_utterances, speech_result  # noqa: E402


def said(codes: Any, heard: str = "") -> Utterance:
    return Utterance(np.array(codes, dtype=np.int64).reshape(-1, 2), True, heard)


def next_codes(kl: list[float], bad: int | None = None) -> Scores:
    values = np.array(kl)
    finite = np.ones(len(kl), bool)
    if bad is not None:
        finite[bad], values[bad] = False, np.nan
    return Scores(values, values < 0.5, values < 0.5, values, finite)


def result(
    reference: list[Utterance], model: list[SpokenSide], answers: list[str], floor: list[SpokenSide] | None = None
) -> Any:
    samples: Any = [SimpleNamespace(sample=SimpleNamespace(answer=answer)) for answer in answers]
    known: Any = [SpokenReference(one, None) for one in reference]  # type: ignore[arg-type]
    return speech_result(samples, known, model, floor or [], seed=0)


def test_agreement_is_counted_over_the_references_codes() -> None:
    """Four frames of two codes; the model changes one code, and stops a frame early."""
    reference = said([[1, 2], [3, 4], [5, 6], [7, 8]])
    model = SpokenSide(said([[1, 2], [3, 9], [5, 6]]), next_codes([0, 0, 0, 1, 0]))
    found = result([reference], [model], ["a text"])
    assert found.code_agreement.value == 5 / 8
    assert found.first_code_agreement.value == 4 / 5
    assert found.code_kl_mean.value == pytest.approx(1 / 5)
    assert found.frames_ratio == 3 / 4
    assert (found.frames, found.utterances, found.recognition, found.floor) == (4, 1, None, None)


def test_later_codes_are_told_apart_from_first_ones() -> None:
    """A record without them has none; a speech with a number that is not finite is counted once."""
    reference = [said([[1, 2], [3, 4]]), said([[5, 6]])]
    model = [
        SpokenSide(reference[0], next_codes([0, 0, 0]), next_codes([0.25, 1.0])),
        SpokenSide(reference[1], next_codes([0, 0]), next_codes([0.0, 9.0], 1)),
    ]
    found = result(reference, model, ["a", "b"])
    assert found.later_code_kl_mean.value == pytest.approx(1.25 / 3)
    assert found.later_code_agreement.value == pytest.approx(2 / 3)
    assert (found.code_kl_mean.value, found.non_finite) == (0, 1)
    silent = result(reference[:1], [SpokenSide(reference[0], next_codes([0, 0, 0]))], ["a"])
    assert (silent.later_code_kl_mean, silent.later_code_agreement) == (None, None)


def test_silence_agrees_with_silence_alone() -> None:
    spoken = SpokenSide(said([[1, 2]]), next_codes([0]))
    silent = SpokenSide(said([]), next_codes([0]))
    assert result([said([])], [silent], ["x"]).code_agreement.value == 1
    assert result([said([])], [spoken], ["x"]).code_agreement.value == 0
    assert result([said([])], [silent], ["x"]).drift == ()


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    reference = [said(np.ones((7, 2))), said(np.ones((7, 2)))]
    model = [SpokenSide(one, next_codes([0.1] * 8, bad)) for one, bad in zip(reference, (None, 3), strict=True)]
    found = result(reference, model, ["x", "y"])
    assert found.non_finite == 1
    assert found.code_kl_mean.value == pytest.approx(0.1)
    noisy = Utterance(reference[0].codes, False, "")
    assert result(reference[:1], [SpokenSide(noisy, model[0].codes)], ["x"]).non_finite == 1


def test_drift_is_told_of_long_utterances_by_quarters() -> None:
    long, half, short = (said(np.ones((count, 2))) for count in (11, 6, 4))
    model = [
        SpokenSide(long, next_codes([0.0] * 3 + [1.0] * 3 + [2.0] * 3 + [3.0] * 3)),
        SpokenSide(half, next_codes([1.0] * 7)),
        SpokenSide(short, next_codes([9.0] * 5)),
    ]
    found = result([long, half, short], model, ["a", "b", "c"])
    assert found.long_utterances == 2
    # Twelve and seven positions: quarters of three and two (the last of seven has one).
    expected = [(0 * 3 + 2) / 5, (3 + 2) / 5, (6 + 2) / 5, (9 + 1) / 4]
    assert [part.value for part in found.drift] == pytest.approx(expected)
    assert all(part.low <= part.value <= part.high for part in found.drift)
    known: Any = [SpokenReference(said(np.ones((3, 2))), None)]  # type: ignore[arg-type]
    assert long_utterances(known) == [], "three frames have no quarters"


def test_understood_digits_are_compared_in_pairs() -> None:
    reference = [said([[1, 1]], heard) for heard in ("3", "4", "x", "5")]
    model = [SpokenSide(said([[1, 1]], heard), next_codes([0, 0])) for heard in ("3", "9", "1", "5")]
    found = result(reference, model, ["3", " 4", "1", "some text"]).recognition
    assert (found.utterances, found.reference, found.model) == (3, 2 / 3, 2 / 3)
    assert found.difference.value == 0
    assert found.difference.low < 0 < found.difference.high
    assert [is_digit(text) for text in ("7", " 7", "12", "", "seven", "７")] == [True, True, False, False, False, False]


def test_the_listener_hears_real_recordings() -> None:
    """Bundled recordings, none of which it learned from, as sound at 24 kHz; loudness does not matter much."""
    soundfile, soxr = pytest.importorskip("soundfile"), pytest.importorskip("soxr")

    from omnifp4.evaluation.listening import load_listener
    from omnifp4.evaluation.threads import suited_threads

    listen = load_listener()
    right = 0
    recordings = sorted(SAMPLES.glob("?_*_0.wav"))
    assert len(recordings) == 60
    with suited_threads(64, torch.device("cpu")):
        for number, path in enumerate(recordings):
            wave, rate = soundfile.read(path, dtype="float32")
            wave = soxr.resample(wave, rate, 24_000).astype(np.float32)
            right += listen(wave * (0.3, 1.0)[number % 2]) == path.name[0]
    assert right >= 58
    assert listen(np.full(24_000, np.nan, np.float32)) == ""
    assert listen(np.zeros(10, np.float32)) in set("0123456789")


def test_a_run_has_a_noise_floor_of_speech(receipt: Any, tiny_omni: Path, few: Path, cache: Path) -> None:
    speech, floor = receipt.speech, receipt.speech.floor
    assert 0 < floor.code_kl_mean.value < speech.code_kl_mean.value
    assert 0 <= floor.code_agreement.value <= 1
    assert len(floor.drift) == len(speech.drift)
    assert floor.recognition.reference == speech.recognition.reference
    assert speech.recognition.utterances == 1


def test_the_floor_changes_attention_in_talker_and_predictor_and_puts_it_back(tiny_omni: Path, few: Path) -> None:
    from omnifp4.evaluation.data import read_data
    from omnifp4.evaluation.encoding import encode
    from omnifp4.evaluation.pair import open_pair
    from omnifp4.evaluation.sides import OTHER_ATTENTION
    from omnifp4.evaluation.speech import Talker
    from omnifp4.runtime import load

    pair = open_pair(tiny_omni, tiny_omni)
    (sample,) = (encode(one, pair.processor, pair.config) for one in read_data(few) if one.speak)
    model = load(tiny_omni, device="cpu", dtype=torch.bfloat16, speech=True, progress=False)
    asked: list[str] = []
    configs = [model.talker.model.config, model.talker.code_predictor.model.config]
    model.talker.code_predictor.model.register_forward_pre_hook(
        lambda *_: asked.extend(config._attn_implementation for config in configs)
    )
    usual, other = Talker(model, "here", None), Talker(model, "here", None, OTHER_ATTENTION)
    opening, first = usual.speak(sample)
    assert set(asked) == {"sdpa"}
    asked.clear()
    other.speak(sample)
    assert set(asked) == {OTHER_ATTENTION}
    assert [config._attn_implementation for config in configs] == ["sdpa", "sdpa"]
    codes = usual.next_codes(opening, first.codes)
    # Greedy codes are the likeliest ones, all before them given, where no penalty bent them.
    if opening.repetition_penalty == 1:
        assert (codes.first.argmax(-1)[:-1] == codes.followed[:-1]).float().mean() > 0.9
    # None bends the later codes, and the code predictor sees the same states in one pass as step by step.
    assert codes.later is not None
    assert codes.later_followed is not None
    assert codes.later.shape[0] == first.codes[:, 1:].size > 0
    assert (codes.later.argmax(-1) == codes.later_followed).float().mean() > 0.95
    codes = usual.next_codes(opening, first.codes[:0])
    assert codes.first.shape[0] == 1
    assert codes.followed.tolist() == [opening.eos]
    assert codes.later is None


def test_a_talker_without_numbers_is_named(tiny_omni: Path, few: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from omnifp4 import evaluate
    from omnifp4.errors import OmniFP4Error
    from omnifp4.evaluation import run
    from omnifp4.evaluation.speech import Talker

    made: list[Talker] = []

    def broken(model: Any, *values: Any) -> Talker:
        model.talker.codec_head.weight.data.fill_(float("nan"))
        made.append(Talker(model, *values))
        return made[-1]

    monkeypatch.setattr(run, "Talker", broken)
    with pytest.raises(OmniFP4Error, match=r"sample 'sound': the talker's output is not finite .*omnifp4 verify"):
        evaluate(tiny_omni, against=tiny_omni, data=few, cache=tmp_path, floor=False)
