"""Speech: Transformers' own, in pieces that fit together, by speakers that exist, into files that stay valid."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import chat_media as made

from omnifp4.chat.answer import Answer, SpeechPiece
from omnifp4.chat.errors import ChatError
from omnifp4.chat.generated import read_generated
from omnifp4.chat.generation import Options
from omnifp4.chat.inputs import build_inputs
from omnifp4.chat.messages import user_message
from omnifp4.chat.speech import FrameDecoder, Script, choose_speaker, speak
from omnifp4.chat.wav import WavWriter
from omnifp4.decoding.module_engine import ThinkerDecoder

FRAME = 1920
CUT = 555
"""Samples that the transposed convolutions cut off at the end."""


@contextmanager
def exact_waveforms(model: Any) -> Iterator[Any]:
    """code2wav in float32, so that rounding is small enough to see a wrong sample."""
    own = model.code2wav
    model.code2wav = copy.deepcopy(own).float()
    try:
        yield model.code2wav
    finally:
        model.code2wav = own


def script_of(chat: Any, **media: Any) -> tuple[Script, Any]:
    """A text, and the arguments that make Transformers' generate() write and say the same."""
    loaded, _ = chat.read([user_message("Hello", **media)])
    inputs = build_inputs(chat.model, chat.processor, loaded, device=chat.device)
    decoder = ThinkerDecoder(chat.model, keep_states=True)
    tokens = [int(decoder.prefill(inputs).argmax())]
    # The last token ends the text, so it must not stand in it; nobody knows it is no end marker.
    while len(tokens) < 5 or tokens[-1] in tokens[:-1]:
        tokens.append(int(decoder.step(tokens[-1]).argmax()))
        assert len(tokens) < 60
    arguments = {
        **inputs.tensors,
        "return_audio": True,
        "thinker_max_new_tokens": len(tokens),
        "thinker_do_sample": False,
        "thinker_eos_token_id": tokens[-1],
    }
    if inputs.sound_in_video:
        arguments |= {"use_audio_in_video": True, "talker_use_audio_in_video": True}
    return Script(inputs, decoder.states, tuple(tokens[:-1]), tokens[-1], "chelsie"), arguments


@pytest.mark.parametrize(
    "media",
    [
        {},
        {"audios": made.tone()},
        {"images": made.picture(), "videos": [[made.picture()] * 4]},
        {"videos": [made.sounding_video()]},
    ],
    ids=["text", "audio", "image and video", "video with sound"],
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("engine", ["auto", "stock"])
def test_speech_is_that_of_transformers(
    new_chat: Callable[..., Any], media: dict[str, Any], temperature: float, engine: str
) -> None:
    chat = new_chat()
    script, arguments = script_of(chat, **media)
    torch.manual_seed(5)
    output = chat.model.generate(
        **arguments, speaker="Chelsie", talker_max_new_tokens=21, talker_do_sample=temperature > 0
    )
    (theirs,) = read_generated(output, 0).waveforms or ()
    seconds = 20 * FRAME / 24_000
    options = Options(seed=5, speech_temperature=temperature, max_speech_seconds=seconds, speech_engine=engine)
    (ours,) = speak(chat.model, script, options, chunks=False)
    assert len(ours) == 20 * FRAME - CUT
    assert (ours == theirs).all(), "bit for bit: the same talker, the same draws, one decode"


def test_chunks_are_the_whole(new_chat: Callable[..., Any]) -> None:
    chat = new_chat()
    script, _ = script_of(chat)
    options = Options(seed=1, max_speech_seconds=80 * FRAME / 24_000)
    with exact_waveforms(chat.model):
        (whole,) = speak(chat.model, script, options, chunks=False)
        pieces = list(speak(chat.model, script, options, chunks=True))
    assert [len(piece) for piece in pieces] == [12 * FRAME - CUT, 50 * FRAME, 18 * FRAME]
    # Convolutions of another length sum in another order; a shift by one sample would be a thousand times as much.
    assert np.abs(np.concatenate(pieces) - whole).max() < 1e-4
    assert np.abs(whole[1:] - whole[:-1]).max() > 0.1


def test_a_thread_that_decodes_gives_the_same(new_chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; and what fails in it arrives."""
    chat = new_chat()
    script, _ = script_of(chat)
    options = Options(max_speech_seconds=20 * FRAME / 24_000)
    here = list(speak(chat.model, script, options, chunks=True))
    monkeypatch.setattr(FrameDecoder, "on_gpu", True)
    monkeypatch.setattr(FrameDecoder, "beside_the_talker", lambda _: nullcontext())
    there = list(speak(chat.model, script, options, chunks=True))
    assert len(here) == len(there) == 2 and all((a == b).all() for a, b in zip(here, there, strict=True))

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(chat.model.code2wav, "forward", fail)
    with pytest.raises(ValueError, match="broken"):
        list(speak(chat.model, script, replace(options, max_speech_seconds=300.0), chunks=True))


def test_long_speech_has_no_seams(new_chat: Callable[..., Any]) -> None:
    """Beyond 300 frames the model's own chunked_decode leaves 23 ms out; the whole decoded at once does not."""
    chat = new_chat()
    script, _ = script_of(chat)
    options = Options(max_speech_seconds=310 * FRAME / 24_000)
    codes: list[Any] = []
    with exact_waveforms(chat.model) as code2wav, torch.no_grad():
        hook = code2wav.register_forward_pre_hook(lambda _, arguments: codes.append(arguments[0]))
        ours = np.concatenate(list(speak(chat.model, script, options, chunks=False)))
        hook.remove()
        first, last = codes
        stacked = torch.cat([first, last[..., first.shape[-1] - 310 :]], dim=-1)
        whole = code2wav(stacked)[0, 0].numpy()
        stock = code2wav.chunked_decode(stacked)[0, 0].numpy()
    assert stacked.shape[-1] == 310 and len(stock) == len(whole) - CUT
    assert ours.shape == whole.shape and np.abs(ours - whole).max() < 1e-4


def test_stream_gives_text_then_speech_then_answer(new_chat: Callable[..., Any]) -> None:
    events = list(new_chat(max_speech_seconds=3).stream("Hello", speak="ethan"))
    kinds = [type(event).__name__ for event in events]
    assert kinds == sorted(kinds, key=["TextPiece", "SpeechPiece", "Answer"].index) and kinds.count("SpeechPiece") == 2
    answer = events[-1]
    assert isinstance(answer, Answer) and answer.sampling_rate == 24_000 and answer.waveform is not None
    pieces = [event.waveform for event in events if isinstance(event, SpeechPiece)]
    assert (np.concatenate(pieces) == answer.waveform).all()
    assert answer.waveform.dtype == np.float32 and np.abs(answer.waveform).max() <= 1


def test_speech_reproduces_and_depends_on_seed_and_speaker(new_chat: Callable[..., Any]) -> None:
    def say(**arguments: Any) -> Any:
        return new_chat().ask("Hello", **{"speak": "Ethan", **arguments}).waveform

    first = say()
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert (first == say()).all()
    assert torch.equal(state, torch.random.get_rng_state())
    assert (first != say(seed=1)).any()
    assert (first != say(speak="Aiden")).any()


def test_speakers(new_chat: Callable[..., Any]) -> None:
    chat = new_chat()
    assert set(chat.speakers) == {"Ethan", "Chelsie", "Aiden"}
    assert [choose_speaker(chat.model, name) for name in (True, "CHELSIE", "aiden")] == ["ethan", "chelsie", "aiden"]
    for name in ("Bob", "", 3):
        with pytest.raises(ChatError, match=r"there is no speaker .*speakers: .*Ethan"):
            chat.ask("Hello", speak=name) if name else choose_speaker(chat.model, name)
    assert chat.history == []


def test_speech_left_out(tiny_artifact: Path, transformers: Any, new_chat: Callable[..., Any]) -> None:
    chat = new_chat(model=tiny_artifact, processor=None, device="cpu", speech=False)
    assert not hasattr(chat.model, "talker") and chat.speakers == ()
    assert chat.ask("Hello").waveform is None
    for name in (True, "Ethan"):
        with pytest.raises(ChatError, match="loaded without its talker"):
            chat.ask("Hello", speak=name)
    with pytest.raises(ChatError, match="loaded without its talker"):
        new_chat(speech=False).ask("Hello", speak=True)


def test_nothing_to_say(new_chat: Callable[..., Any]) -> None:
    """An answer that ends at once: stock code fails, ours is silent."""
    end = new_chat().model.config.im_end_token_id

    class Mute(ThinkerDecoder):
        def prefill(self, inputs: Any) -> Any:
            return torch.nn.functional.one_hot(torch.full_like(super().prefill(inputs)[:, 0].long(), end), 2048).float()

    chat = new_chat(decoder=Mute)
    answer = chat.ask("Hello", speak=True)
    assert answer.text == "" and answer.waveform is None and answer.finish_reason == "eos"
    assert answer.stats.real_time_factor is None
    assert len(chat.history) == 2


def test_a_talker_that_ends_at_once(new_chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock code stacks an empty list of codes."""
    chat = new_chat()
    config = chat.model.config.talker_config
    head = chat.model.talker.codec_head

    def end(_: Any, __: Any, output: Any) -> Any:
        output[..., config.codec_eos_token_id] = 1e4
        return output

    hook = head.register_forward_hook(end)
    try:
        script, arguments = script_of(chat)
        with pytest.raises(RuntimeError):
            chat.model.generate(**arguments, talker_max_new_tokens=8)
        assert list(speak(chat.model, script, Options(), chunks=True)) == []
        assert chat.ask("Hello", speak=True).waveform is None
    finally:
        hook.remove()


def test_errors_of_the_talker_arrive(new_chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = new_chat()

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(chat.model.talker.model, "forward", fail)
        with pytest.raises(ValueError, match="broken"):
            chat.ask("Hello", speak=True)
    assert chat.history == []
    for part in (chat.model.thinker, chat.model.talker):
        assert "generate" not in part.__dict__, "borrowed methods are given back"
    assert chat.ask("Hello", speak=True).waveform is not None


def test_leaving_early_ends_the_talker(new_chat: Callable[..., Any]) -> None:
    import threading

    chat = new_chat(max_speech_seconds=300)
    steps: list[Any] = []
    hook = chat.model.talker.codec_head.register_forward_hook(lambda *_: steps.append(None))
    for event in chat.stream("Hello", speak=True):
        if isinstance(event, SpeechPiece):
            break
    del event
    hook.remove()
    assert len(steps) < 2000, "it had 3750 to make"
    assert all(thread.name != "omnifp4-speech" for thread in threading.enumerate())
    assert [message["role"] for message in chat.history] == ["user", "assistant"], "what was said stays"


def test_ctrl_c_while_speaking(new_chat: Callable[..., Any]) -> None:
    chat = new_chat(max_speech_seconds=300)
    heard: list[Any] = []

    def listen(waveform: Any) -> None:
        heard.append(waveform)
        raise KeyboardInterrupt

    answer = chat.ask("Hello", speak=True, on_speech=listen)
    assert answer.finish_reason == "interrupted" and len(answer.text) > 0
    assert answer.waveform is not None and (answer.waveform == np.concatenate(heard)).all() and len(heard) == 1
    assert chat.history[-1]["content"][0]["text"] == answer.text
    assert chat.ask("And?", speak=True, max_speech_seconds=1.0).waveform is not None


def test_wav_is_valid_after_each_chunk(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    tone = made.tone(0.1, 24_000)
    writer = WavWriter(path)
    assert len(made.read_wav(path)[1]) == 0
    for count in (1, 2):
        writer.write(tone)
        rate, samples = made.read_wav(path)
        assert rate == 24_000 and len(samples) == count * len(tone)
    writer.close()
    assert np.abs(made.read_wav(path)[1][: len(tone)] / 32767 - tone).max() < 1 / 32767
    with pytest.raises(KeyboardInterrupt), WavWriter(path) as again:
        again.write(np.array([2.0, -2.0], np.float32))
        raise KeyboardInterrupt
    assert made.read_wav(path)[1].tolist() == [32767, -32767]
    with pytest.raises(ChatError), WavWriter(path):
        raise ChatError("before the first sound")
    assert not path.exists(), "an error before any sound leaves no file that looks like silence"
    with pytest.raises(ChatError, match="cannot write"):
        WavWriter(tmp_path / "none" / "a.wav")
