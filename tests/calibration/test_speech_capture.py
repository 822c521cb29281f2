"""Talker and code predictor: what they read while answers are spoken adds up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnifp4.calibration.failures import CalibrationFailed
from omnifp4.errors import OmniFP4Error

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")

TALKER = "talker.model.layers"
CHOSEN = 2
"""Experts of a token, in thinker and talker of the tiny model."""


def test_tokens_of_a_speech(captured: tuple[Path, Any]) -> None:
    """A frame is one token of the talker; the code predictor reads two at first, then one for each code."""
    from omnifp4.calibration.statistics import open_statistics

    with open_statistics(captured[0]) as statistics:

        def tokens(name: str) -> int:
            return statistics.of(f"{name}.weight").tokens

        frames = tokens("talker.code_predictor.lm_head.1")
        assert frames > 10
        assert tokens("talker.code_predictor.lm_head.2") == frames
        assert tokens("talker.code_predictor.lm_head.0") == 2 * frames
        everything = tokens(f"{TALKER}.0.self_attn.q_proj")
        assert everything > frames
        for name in (f"{TALKER}.1.self_attn.o_proj", f"{TALKER}.1.mlp.shared_expert.down_proj", "talker.codec_head"):
            assert tokens(name) == everything
        for layer in (0, 1):
            routed = sum(
                statistics.tokens(f"{TALKER}.{layer}.mlp.experts.{expert}.up_proj.weight") for expert in range(4)
            )
            assert routed == CHOSEN * everything


def test_inputs_are_those_of_the_whole_model(captured: tuple[Path, Any], tiny_omni: Path, sequences: list[Any]) -> None:
    """Capture has only the talker in memory, and states that the run through the layers left behind."""
    from contextlib import closing

    from omnifp4.calibration.speech import FRAMES_A_TOKEN, TEMPERATURE
    from omnifp4.calibration.statistics import open_statistics
    from omnifp4.chat.inputs import ModelInputs
    from omnifp4.decoding.module_engine import ThinkerDecoder
    from omnifp4.decoding.speech_engine import engine_for
    from omnifp4.decoding.speech_sampling import CodeSampling
    from omnifp4.decoding.talker_opening import assemble, written_text
    from omnifp4.runtime import load

    model = load(tiny_omni, device="cpu", dtype=torch.bfloat16, progress=False)
    seen: dict[str, list[Any]] = {}
    modules = {
        "talker.hidden_projection.linear_fc1": model.talker.hidden_projection.linear_fc1,
        f"{TALKER}.1.self_attn.o_proj": model.talker.model.layers[1].self_attn.o_proj,
        "talker.code_predictor.model.layers.1.mlp.down_proj": model.talker.code_predictor.model.layers[1].mlp.down_proj,
    }
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, values, key=name: seen.setdefault(key, []).append(values[0].reshape(-1, values[0].shape[-1]))
        )
    spoken = [one for one in sequences if one.sample.speak]
    assert any(one.sample.modality != "text" for one in spoken)
    end = model.config.im_end_token_id
    for one in spoken:
        tensors, count = dict(one.tensors), one.prompt_tokens
        answer = tuple(tensors["input_ids"][0, count:-1].tolist())
        tensors |= {name: tensors[name][:, :count] for name in ("input_ids", "attention_mask")}
        decoder = ThinkerDecoder(model, keep_states=True)
        decoder.prefill(ModelInputs(tensors, one.sound_in_video, ""))
        written = written_text(model, tensors["input_ids"], decoder.states, answer, end)
        opening = assemble(model, tensors, written, eos=end, speaker="ethan", sound_in_video=one.sound_in_video)
        sampling = CodeSampling(False, TEMPERATURE, opening.top_k, opening.top_p, opening.repetition_penalty)
        most = FRAMES_A_TOKEN * (2 + len(answer))
        made = engine_for(model.talker, "modules").frames(opening, sampling, seed=0, most_frames=most)
        with closing(made):
            assert list(made)
    with open_statistics(captured[0]) as statistics:
        for name in modules:
            found, x = statistics.of(f"{name}.weight"), torch.cat(seen[name]).double()
            assert found.tokens == len(x)
            torch.testing.assert_close(found.square_mean.double(), x.square().mean(0), rtol=1e-4, atol=1e-9)


def test_a_talker_that_reads_the_last_norm(calibrate: Callable[..., Any], tmp_path: Path) -> None:
    from omnifp4.tiny import write_tiny_omni

    model = write_tiny_omni(tmp_path / "shallow", layers=1)
    receipt = calibrate(model, tmp_path / "out", samples=8, speech=True)
    assert receipt.components["talker.projections"] == 4
    assert not receipt.failures


@pytest.mark.parametrize("experts", ["thinker.model.layers.3.mlp.experts", f"{TALKER}.1.mlp.experts"])
def test_experts_together_saw_what_all_saw(captured: tuple[Path, Any], experts: str) -> None:
    """Each token went to two experts, so their sums together are twice the sum of all tokens. Any reader opens the file."""
    from safetensors.torch import load_file

    tensors = load_file(captured[0])
    bank = f"{experts}.gate_up"
    counts = tensors[f"{bank}.routed.tokens"].double()
    whole = tensors[f"{bank}.all-expert.tokens"].double()
    assert counts.sum() == CHOSEN * whole.sum()
    for field in ("square_mean", "abs_mean"):
        of_experts = (counts[:, None] * tensors[f"{bank}.routed.{field}"].double()).sum(0)
        of_all = CHOSEN * whole * tensors[f"{bank}.all-expert.{field}"][0].double()
        torch.testing.assert_close(of_experts, of_all, rtol=1e-5, atol=0)
    assert tensors[f"{bank}.routed.amax"].max() == tensors[f"{bank}.all-expert.amax"].max()


def test_a_speech_that_fails(
    calibrate: Callable[..., Any],
    tiny_omni: Path,
    tmp_path: Path,
    write_lines: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from omnifp4.calibration import speech

    def fails(*_: Any) -> None:
        raise TypeError("talker takes no such thing")

    monkeypatch.setattr(speech, "_speak", fails)
    lines = [{"id": f"{number}", "messages": "Hi", "answer": "1", "speak": number == 2} for number in range(4)]
    data = write_lines(*lines)
    with pytest.raises(CalibrationFailed, match=r"1 of 4 samples failed .*'2': TypeError: talker takes no such thing"):
        calibrate(tiny_omni, tmp_path / "out", data=data, samples=None, speech=True)
    assert not (tmp_path / "out").exists()
    # The layers are done, so a run that tolerates it goes on from there.
    receipt = calibrate(tiny_omni, tmp_path / "out", data=data, samples=None, speech=True, max_failed=0.25, resume=True)
    assert receipt.resumed_layers == 4
    assert [one.sample for one in receipt.failures] == ["2"]
    assert "talker.attention" not in receipt.components
    assert receipt.not_captured["talker.attention"] == "no conversation of the set reached it"


def test_speech_that_comes_too_late(
    calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states that it would read are gone: a run that goes on says so, and one that insists is refused."""
    from omnifp4.calibration import capture

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(capture, "assemble", dies)
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny_omni, tmp_path / "out", samples=8, speech=False)
    with pytest.raises(OmniFP4Error, match="--speech was asked for: the run that is continued was begun without"):
        calibrate(tiny_omni, tmp_path / "out", samples=8, speech=True, resume=True)
    receipt = calibrate(tiny_omni, tmp_path / "out", samples=8, speech=None, resume=True)
    assert receipt.resumed_layers == 4
    assert receipt.not_captured["talker.head"] == "the run that is continued was begun without speech"


def test_no_memory_for_the_whole_model(
    calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omnifp4.calibration import speech

    monkeypatch.setattr(speech, "free_bytes", lambda _: 1_000_000)
    receipt = calibrate(tiny_omni, tmp_path / "out", samples=8, speech=None)
    reason = receipt.not_captured["talker.experts"]
    assert reason.startswith("talker and embeddings take 0.0")
    assert reason.endswith("GB of memory, and cpu has 0.001 GB free")
    assert receipt.not_captured["code_predictor"] == reason
    assert "thinker.experts" in receipt.components
