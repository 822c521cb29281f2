"""Steps of any size give what one call gives."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import chat_media as made

from omnifp4.chat.errors import ChatError
from omnifp4.chat.session import StepSession

MESSAGES = [{"role": "user", "content": [{"type": "audio", "audio": made.tone()}, "Tell me a story."]}]
OPTIONS = {"max_new_tokens": 17, "temperature": 1.0, "seed": 4}


@pytest.mark.parametrize("size", [1, 3, 17, 100])
def test_steps_equal_one_call(new_chat: Callable[..., Any], size: int) -> None:
    chat = new_chat()
    whole = chat.complete(MESSAGES, speak="Ethan", **OPTIONS)
    session = StepSession(chat)
    state = session.start(MESSAGES, speak="Ethan", **OPTIONS)
    assert not state.finished and state.tokens == 0
    text, steps = "", 0
    while not state.finished:
        # Numbers that the framework draws between two steps are its own affair.
        torch.rand(3)
        state = session.step(state, size)
        text += state.new_text
        steps += 1
        assert text == state.text and whole.text.startswith(text)
    assert steps == -(-17 // size)
    answer = session.finish(state)
    assert (answer.text, answer.tokens, answer.finish_reason) == (whole.text, whole.tokens, "length")
    assert answer.waveform is not None and (answer.waveform == whole.waveform).all()
    assert answer.stats.prompt_tokens == whole.stats.prompt_tokens and answer.stats.new_tokens == 17
    assert chat.history == []


def test_one_prefill_then_one_token_at_a_time(new_chat: Callable[..., Any]) -> None:
    chat = new_chat()
    lengths: list[int] = []
    decoder = chat.model.thinker.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda _, __, named: lengths.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        session = StepSession(chat)
        state = session.start(MESSAGES)
        for _ in range(3):
            session.step(state, 2)
    finally:
        hook.remove()
    assert lengths[0] > 13 and lengths[1:] == [1] * 5, "the cache is kept"


def test_sessions_interleave(new_chat: Callable[..., Any]) -> None:
    chat = new_chat(max_new_tokens=10)
    session = StepSession(chat)
    questions = [MESSAGES, "Hello", [{"type": "image", "image": made.picture()}, "What?"]]
    whole = [chat.complete(question).tokens for question in questions]
    states = [session.start(question) for question in questions]
    while not all(state.finished for state in states):
        for state in states:
            session.step(state, 2)
    assert [session.finish(state).tokens for state in states] == whole


def test_finishing_early_and_late(new_chat: Callable[..., Any]) -> None:
    session = StepSession(new_chat())
    state = session.start("Hello")
    session.step(state, 3)
    answer = session.finish(state)
    assert answer.finish_reason == "interrupted" and len(answer.tokens) == 3 and answer.text == state.text
    for call in (lambda: session.step(state), lambda: session.finish(state)):
        with pytest.raises(ChatError, match="this session is over"):
            call()
    empty = session.finish(session.start("Hello"))
    assert empty.text == "" and empty.tokens == ()


def test_a_finished_state_stays(new_chat: Callable[..., Any]) -> None:
    session = StepSession(new_chat(max_new_tokens=3))
    state = session.step(session.start("Hello"), 5)
    text = state.text
    assert state.finished and session.step(state, 5).text == text and state.new_text == "" and state.tokens == 3
    with pytest.raises(ChatError, match="at least one token"):
        session.step(state, 0)


def test_start_is_as_strict_as_ask(new_chat: Callable[..., Any]) -> None:
    session = StepSession(new_chat())
    for arguments in ({"messages": ""}, {"messages": "x", "speak": "Nobody"}, {"messages": "x", "max_tokens": 3}):
        with pytest.raises(ChatError):
            session.start(**arguments)
