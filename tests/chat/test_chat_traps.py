"""The traps that people fell into with the plain API: shown to be there, and not to be reachable from here."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import chat_media as made

from omnifp4.chat.errors import ChatError
from omnifp4.chat.omni_chat import OmniChat

SHORT = {"thinker_max_new_tokens": 4, "talker_max_new_tokens": 4}


def test_a_plain_prompt_crashes_the_stock_talker_only(
    load_tiny: Callable[[], Any], processor: Any, new_chat: Callable[..., Any]
) -> None:
    stock = load_tiny()
    plain = processor(text=["Hello! How are you today?"], return_tensors="pt")
    with pytest.raises((RuntimeError, IndexError)):
        stock.generate(**plain, return_audio=True, thinker_eos_token_id=stock.config.im_end_token_id, **SHORT)
    answer = new_chat().ask("Hello! How are you today?", speak=True)
    assert answer.text and answer.waveform is not None


def test_a_prompt_written_by_hand_is_refused(new_chat: Callable[..., Any]) -> None:
    """The cure that people found is not needed, and would nest roles in roles."""
    with pytest.raises(ChatError, match=r"contains the marker '<\|im_start\|>'"):
        new_chat().ask("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")


def test_string_content_is_made_nested(new_chat: Callable[..., Any]) -> None:
    chat = new_chat()
    flat = chat.complete([{"role": "user", "content": "The capital of France is"}])
    nested = chat.complete([{"role": "user", "content": [{"type": "text", "text": "The capital of France is"}]}])
    assert flat.tokens == nested.tokens


def test_speech_after_audio_crashes_stock_only(load_tiny: Callable[[], Any], processor: Any) -> None:
    stock = load_tiny()
    messages = [{"role": "user", "content": [{"type": "audio", "audio": "a"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # With an image too, the talker counts positions of media, and reads a config that it does not have.
    image = [{"type": "image", "image": "b"}]
    messages[0]["content"] += image  # type: ignore[operator]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, audio=[made.tone()], images=[made.picture()], return_tensors="pt")
    end = stock.config.im_end_token_id
    with pytest.raises(AttributeError, match="audio_config"):
        stock.generate(**inputs, return_audio=True, thinker_eos_token_id=end, **SHORT)
    chat = OmniChat(stock, processor=processor, max_new_tokens=4, max_speech_seconds=0.3)
    assert chat.ask("What?", audios=made.tone(), images=made.picture(), speak=True).waveform is not None


def test_the_default_end_marker_is_not_this_models(
    load_tiny: Callable[[], Any], processor: Any, new_chat: Callable[..., Any]
) -> None:
    """generate() takes the released model's number for granted; ours reads the config."""
    import inspect

    stock = load_tiny()
    assert inspect.signature(stock.generate).parameters["thinker_eos_token_id"].default == 151645
    end = stock.config.im_end_token_id
    assert end != 151645
    bias = torch.zeros(2048)
    bias[end] = 1e4
    hook = stock.thinker.lm_head.register_forward_hook(lambda _, __, output: output + bias.to(output.dtype))
    try:
        ids = processor(text="<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
        output = stock.generate(**ids, return_audio=False, thinker_max_new_tokens=6)
        assert (output[0, ids["input_ids"].shape[1] :] == end).sum() > 1, "stock runs past the end"
        answer = OmniChat(stock, processor=processor, max_new_tokens=6, temperature=0).ask("Hello")
        assert answer.finish_reason == "eos" and answer.tokens == (end,)
    finally:
        hook.remove()


def test_an_empty_answer_crashes_stock_speech_only(load_tiny: Callable[[], Any], processor: Any) -> None:
    stock = load_tiny()
    end = stock.config.im_end_token_id
    bias = torch.zeros(2048)
    bias[end] = 1e4
    hook = stock.thinker.lm_head.register_forward_hook(lambda _, __, output: output + bias.to(output.dtype))
    try:
        ids = processor(text="<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
        with pytest.raises(RuntimeError):
            stock.generate(**ids, return_audio=True, thinker_eos_token_id=end, **SHORT)
        answer = OmniChat(stock, processor=processor, temperature=0).ask("Hello", speak=True)
        assert answer.text == "" and answer.waveform is None
    finally:
        hook.remove()


def test_nothing_heavy_is_imported_early() -> None:
    import subprocess
    import sys

    code = "import sys, omnifp4, omnifp4.chat; print([name for name in ('torch', 'transformers', 'av', 'PIL') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
