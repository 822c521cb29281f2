"""What a request may say: OpenAI's forms, and one clear line for what the server does not have."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

import serve_media as made
from serve_requests import BODY, CHAT, message

HELLO = {"role": "user", "content": "Hello"}


def ask(server: Any, **fields: Any) -> Any:
    return httpx.post(server.url + CHAT, json={**BODY, "max_tokens": 8, **fields}, timeout=30)


def answer(server: Any, *messages: dict[str, Any]) -> tuple[str, int]:
    reply = ask(server, messages=[*messages])
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"], reply.json()["usage"]["prompt_tokens"]


def test_voices_are_listed(server: Any) -> None:
    """Where clients look that offer a choice of voices."""
    voices = httpx.get(f"{server.url}/v1/audio/voices").json()["voices"]
    assert [voice["id"] for voice in voices] == list(server.service.chat.speakers)
    assert all(voice["name"] for voice in voices)


def test_several_system_messages_at_the_start(server: Any) -> None:
    """The client's own, and the developer's: the model reads one. One that is empty says nothing."""
    system = {"role": "system", "content": "Be brief."}
    developer = {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}
    together = {"role": "system", "content": "Be brief.\n\nBe kind."}
    assert answer(server, system, developer, HELLO) == answer(server, together, HELLO)
    assert answer(server, {"role": "system", "content": ""}, HELLO) == answer(server, HELLO)
    assert answer(server, {"role": "system", "content": ""}, system, HELLO) == answer(server, system, HELLO)
    reply = ask(server, messages=[HELLO, {"role": "assistant", "content": "x"}, system, HELLO])
    assert reply.status_code == 400 and "one system message, at its start" in message(reply)
    for number, wrong in enumerate(([HELLO | {"content": 5}], [system, developer, HELLO | {"content": None}])):
        place = f"messages.{len(wrong) - 1}.content"
        reply = ask(server, messages=wrong)
        assert reply.status_code == 400 and f"{place} is {('a int', 'missing')[number]}" in message(reply)
        assert reply.json()["error"]["param"] == place


@pytest.mark.parametrize("detail", ["auto", "low", "high", "original", None])
def test_details_of_pictures(server: Any, detail: str | None) -> None:
    part = made.image_part()
    part["image_url"]["detail"] = detail
    assert answer(server, {"role": "user", "content": [part]}) == answer(
        server, {"role": "user", "content": [made.image_part()]}
    )


def picture(**more: Any) -> list[dict[str, Any]]:
    part = made.image_part()
    part["image_url"] |= more
    return [{"role": "user", "content": [part]}]


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"stop": [""]}, "stop.0", "String should have at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "Input should be a valid string or: List should have at most 16 items"),
        ({"stop": 3}, "stop", "Input should be a valid string or: Input should be a valid list"),
        ({"audio": {"voice": 3}}, "audio.voice", "Input should be a valid string or: Input should be a valid dict"),
        ({"audio": {"voice": {}}}, "audio.voice.id", "audio.voice.id is missing"),
        ({"audio": {"voice": {"id": "x", "y": 1}}}, "audio.voice.y", "there is no field 'audio.voice.y'"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "there is no field 'stream_options.x'"),
        ({"modalities": ["text", "image"]}, "modalities.1", "modalities.1: Input should be 'text' or 'audio'"),
        ({"messages": [HELLO, 3]}, "messages.1", "messages.1: Input should be a valid dictionary"),
        ({"messages": picture(detail="fine")}, "messages.0.content.0.image_url.detail", "the detail 'fine' (allowed: "),
        ({"messages": picture(detail=["low"])}, "messages.0.content.0.image_url.detail", "allowed: auto, low, high"),
        (
            {"messages": [HELLO, {"role": "tool", "content": "x", "tool_call_id": "a"}, HELLO]},
            "messages.1.role",
            "messages.1 has the role 'tool': tools are not supported",
        ),
        (
            {"messages": [{"role": "system", "content": ""}, HELLO, {"role": "user", "content": [3]}]},
            "messages.2.content.0",
            "messages.2.content.0 is not an object",
        ),
    ],
)
def test_what_is_wrong_is_named(server: Any, fields: dict[str, Any], param: str, told: str) -> None:
    reply = ask(server, **{"messages": [HELLO], **fields})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param and told in message(reply)
