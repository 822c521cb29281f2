"""What the model is given: every medium reaches it, in place; the context has a rule; the template is checked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import chat_media as made

from omnifp4.chat.errors import ChatError, ContextError, MediaError
from omnifp4.chat.inputs import build_inputs, prompt_text
from omnifp4.chat.messages import normalise
from omnifp4.decoding.module_engine import ThinkerDecoder

IMAGE = {"type": "image", "image": made.picture()}
AUDIO = {"type": "audio", "audio": made.tone()}
SOUNDING = {"type": "video", "video": made.sounding_video()}
VIDEO = {"type": "video", "video": [made.picture(seed=number) for number in range(4)]}


def inputs_of(chat: Any, *parts: Any) -> Any:
    loaded, _ = chat.read([{"role": "user", "content": [*parts, "What?"]}])
    return build_inputs(chat.model, chat.processor, loaded, device=chat.device)


def logits_of(chat: Any, *parts: Any) -> Any:
    return ThinkerDecoder(chat.model, keep_states=False).prefill(inputs_of(chat, *parts))


@pytest.mark.parametrize(
    ("part", "token", "other"),
    [
        (IMAGE, "image_token_id", {"type": "image", "image": made.picture(seed=9)}),
        (AUDIO, "audio_token_id", {"type": "audio", "audio": made.tone(hertz=1000.0)}),
        (VIDEO, "video_token_id", {"type": "video", "video": [made.picture(seed=n) for n in range(5, 9)]}),
        (SOUNDING, "audio_token_id", {"type": "video", "video": made.sounding_video(hertz=900.0)}),
    ],
    ids=["image", "audio", "video", "video with sound"],
)
def test_each_medium_reaches_the_model(new_chat: Callable[..., Any], part: Any, token: str, other: Any) -> None:
    chat = new_chat()
    inputs = inputs_of(chat, part)
    count = int((inputs.tensors["input_ids"] == getattr(chat.model.config.thinker_config, token)).sum())
    assert count > 0
    first, again, changed = (logits_of(chat, one) for one in (part, part, other))
    assert (first == again).all()
    assert (first - changed).abs().max() > 0.05, "another medium of the same size changes the answer"


def test_token_counts(new_chat: Callable[..., Any]) -> None:
    chat = new_chat()
    config = chat.model.config.thinker_config
    parts = [
        IMAGE,
        AUDIO,
        {"type": "audio", "audio": made.tone(2.0)},
        {"type": "video", "video": made.sounding_video(4.0)},
    ]
    ids = inputs_of(chat, *parts).tensors["input_ids"]
    # 64 x 96 pixels in merged patches of 32; 13 tokens a second of sound.
    assert int((ids == config.image_token_id).sum()) == 6
    assert int((ids == config.audio_token_id).sum()) == 13 * (1 + 2 + 4)


def test_silent_and_sounding_videos_mix(new_chat: Callable[..., Any]) -> None:
    chat = new_chat()
    inputs = inputs_of(chat, VIDEO, SOUNDING, AUDIO, IMAGE)
    audio = int((inputs.tensors["input_ids"] == chat.model.config.thinker_config.audio_token_id).sum())
    assert inputs.sound_in_video and audio == 13 * (2 + 2 + 1), "the silent one has silence"
    answer = chat.ask(
        "What?",
        videos=[VIDEO["video"], made.sounding_video()],
        audios=made.tone(),
        images=made.picture(),
        speak=True,
    )
    assert answer.text and answer.waveform is not None


def test_positions_and_logits_are_those_of_transformers(new_chat: Callable[..., Any]) -> None:
    """The prefill computes positions itself; the model's own way gives the same."""
    import torch

    chat = new_chat()
    for parts in ([IMAGE, AUDIO], [SOUNDING], [VIDEO, AUDIO]):
        inputs = inputs_of(chat, *parts)
        with torch.no_grad():
            output = chat.model.thinker(
                **inputs.tensors, use_audio_in_video=inputs.sound_in_video, output_hidden_states=True
            )
        decoder = ThinkerDecoder(chat.model, keep_states=True)
        assert torch.equal(decoder.prefill(inputs), output.logits[:, -1].float())
        assert torch.equal(decoder.states, output.hidden_states[chat.model.config.talker_config.accept_hidden_layer])


@pytest.mark.parametrize("milliseconds", [25, 26, 100, 999])
def test_short_sounds_work(new_chat: Callable[..., Any], milliseconds: int) -> None:
    assert logits_of(new_chat(), {"type": "audio", "audio": made.tone(milliseconds / 1000)}).isfinite().all()


def test_small_and_large_images_work(new_chat: Callable[..., Any]) -> None:
    chat = new_chat()
    for width, height in ((1, 1), (200, 1), (640, 480)):
        assert logits_of(chat, {"type": "image", "image": made.picture(width, height)}).isfinite().all()
    with pytest.raises(MediaError, match="200 times"):
        logits_of(chat, {"type": "image", "image": made.picture(401, 2)})


def test_the_system_message_stays_first(new_chat: Callable[..., Any]) -> None:
    loaded, _ = new_chat(system="Be brief.").read("Hello")
    assert [message["role"] for message in loaded] == ["system", "user"]
    loaded, _ = new_chat(system="Be brief.").read(
        [{"role": "system", "content": "Sing."}, {"role": "user", "content": "x"}]
    )
    assert loaded[0]["content"][0]["text"] == "Sing."


def fill(chat: Any, turns: int) -> None:
    for number in range(turns):
        chat.ask(f"Question {number}: " + "tell me more of the dragon. " * 5)


def test_context_is_trimmed_by_whole_turns(new_chat: Callable[..., Any]) -> None:
    chat = new_chat(system="Be brief.", context_tokens=200)
    fill(chat, 6)
    assert len(chat.history) == 12, "the history itself is kept"
    answer = chat.ask("And now?")
    assert answer.stats.turns_left_out > 0
    assert answer.stats.prompt_tokens + 8 <= 200
    inputs, _ = chat.start_text(
        chat.read([*chat.history[:-2], {"role": "user", "content": "And now?"}])[0], chat.options, keep_states=False
    )
    text = inputs.text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion")
    left = [f"Question {number}:" in text for number in range(6)]
    assert left == sorted(left) and left[-1] and not left[0], "the oldest go first"
    assert text.count("<|im_start|>user") == text.count("<|im_start|>assistant"), "no half turns"


def test_context_is_refused_when_told(new_chat: Callable[..., Any]) -> None:
    chat = new_chat(context="refuse", context_tokens=150)
    fill(chat, 2)
    before = list(chat.history)
    with pytest.raises(ContextError, match=r"tokens and the answer may have 8, together more than the context of 150"):
        fill(chat, 2)
    assert chat.history[: len(before)] == before
    with pytest.raises(ChatError, match="allowed: trim, refuse"):
        new_chat(context="crop")


def test_a_turn_too_long_alone_is_refused(new_chat: Callable[..., Any]) -> None:
    chat = new_chat(context_tokens=100)
    with pytest.raises(ContextError, match="even without the turns before"):
        chat.ask("word " * 200)
    assert chat.history == []
    assert chat.ask("Hello").text
    with pytest.raises(ContextError, match="context of 100"):
        chat.ask("Hello", max_new_tokens=100)


def test_a_template_that_drops_text_or_roles_is_refused(new_chat: Callable[..., Any]) -> None:
    chat = new_chat()
    messages = normalise("Hello dragon")

    def with_template(text: str) -> Any:
        return SimpleNamespace(apply_chat_template=lambda *_, **__: text, tokenizer=chat.processor.tokenizer)

    with pytest.raises(ChatError, match="drops text"):
        prompt_text(with_template("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"), messages)
    with pytest.raises(ChatError, match="no <\\|im_start\\|>user"):
        build_inputs(chat.model, with_template("Hello dragon"), messages, device=chat.device)


def test_a_template_that_wants_plain_system_text(new_chat: Callable[..., Any]) -> None:
    def template(messages: Any, **_: Any) -> str:
        system, user = messages
        return "<|im_start|>system\n" + system["content"] + "<|im_end|>" + user["content"][0]["text"]

    changed = SimpleNamespace(apply_chat_template=template)
    messages = normalise([{"role": "system", "content": "Sing."}, {"role": "user", "content": "Hello"}])
    assert prompt_text(changed, messages) == "<|im_start|>system\nSing.<|im_end|>Hello"
