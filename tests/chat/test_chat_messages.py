"""Messages as people write them, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from omnifp4.chat.errors import ChatError
from omnifp4.chat.messages import check_last, normalise, turns, user_message
from omnifp4.errors import OmniFP4Error

HELLO = [{"type": "text", "text": "Hello"}]
MARKERS = ("<|im_start|>", "<|im_end|>", "<|audio_pad|>")
SAMPLES = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("written", "content"),
    [
        ("Hello", HELLO),
        ({"role": "user", "content": "Hello"}, HELLO),
        ([{"role": "user", "content": "Hello"}], HELLO),
        ([{"role": "user", "content": ["Hello"]}], HELLO),
        ([{"role": "user", "content": {"type": "text", "text": "Hello"}}], HELLO),
        ([{"role": "user", "content": [{"text": "Hello"}]}], HELLO),
        ([{"type": "text", "text": "Hello"}], HELLO),
        (["Hello"], HELLO),
        ({"type": "image", "image": "a.png"}, [{"type": "image", "image": "a.png"}]),
        ([{"image": "a.png"}, "Hello"], [{"type": "image", "image": "a.png"}, *HELLO]),
        ([{"type": "image_url", "image_url": {"url": "a.png"}}], [{"type": "image", "image": "a.png"}]),
        (
            [{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}],
            [{"type": "image", "image": "a.png"}],
        ),
        ([{"type": "image_url", "image_url": "a.png"}], [{"type": "image", "image": "a.png"}]),
        ([{"type": "audio_url", "audio_url": {"url": "a.wav"}}], [{"type": "audio", "audio": "a.wav"}]),
        ([{"type": "video_url", "video_url": {"url": "a.mp4"}}], [{"type": "video", "video": "a.mp4"}]),
        (
            [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}],
            [{"type": "audio", "audio": "data:audio/mp3;base64,AAAA"}],
        ),
        (
            [{"type": "audio", "audio": "a.wav", "sampling_rate": 8000}],
            [{"type": "audio", "audio": "a.wav", "sampling_rate": 8000}],
        ),
        ([{"type": "video", "video": b"x", "sound": False}], [{"type": "video", "video": b"x", "sound": False}]),
    ],
)
def test_every_form_becomes_one(written: Any, content: Any) -> None:
    assert normalise(written) == [{"role": "user", "content": content}]


def test_arrays_pass_as_they_are() -> None:
    part = normalise([{"type": "audio", "audio": SAMPLES}])[0]["content"][0]
    assert part["audio"] is SAMPLES


def test_roles() -> None:
    written = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    assert [message["role"] for message in normalise(written)] == ["system", "user", "assistant", "user"]
    assert turns(normalise(written)) == [[1, 2], [3]]
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert turns(normalise(twice)) == [[0, 1, 2]], "what is said in two messages is one turn"


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (7, "not a value of type int"),
        (None, "not nothing"),
        ([], "empty"),
        ([{"role": "assistant", "content": "Hi"}], "no user message"),
        ([{"role": "tool", "content": "x"}], "message 0 has the role 'tool' (allowed: system, user, assistant)"),
        ([{"role": "user"}], "message 0 (user) has no content"),
        (
            [{"role": "user", "content": "x", "name": "Bo"}],
            "message 0 has the unknown key 'name' (allowed: role, content)",
        ),
        ([{"role": "user", "content": None}], "nothing as content"),
        ([{"role": "user", "content": 3}], "a value of type int as content"),
        ([{"role": "user", "content": ""}], "message 0 (user) is empty"),
        ([{"role": "user", "content": []}], "message 0 (user) is empty"),
        ([{"role": "user", "content": "x"}, "y"], "message 1 is a value of type str"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "message 1 (system) is not the first"),
        (
            [{"role": "user", "content": [{"type": "picture", "picture": 1}]}],
            "part 0 has the type 'picture' (allowed: text",
        ),
        ([{"role": "user", "content": [{"url": "x"}]}], "part 0 has no type"),
        ([{"role": "user", "content": [{"type": "image", "path": "x"}]}], "unknown key 'path' (allowed: type, image)"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part 0 (image) has no 'image'"),
        ([{"role": "user", "content": [{"type": "image", "image": {"url": "x"}}]}], "a value of type dict as image"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": "x"}}]}], "unknown key 'uri'"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "a value of type int as text"),
        ([{"role": "user", "content": [SAMPLES]}], "part 0 is a value of type ndarray"),
        ([{"type": "input_audio", "input_audio": {"data": "AA", "format": "midi"}}], "the format 'midi' (allowed: wav"),
        ([{"type": "input_audio", "input_audio": {"data": b"x"}}], "base64"),
        (
            [{"role": "system", "content": [{"type": "image", "image": "x"}]}, {"role": "user", "content": "x"}],
            "text only",
        ),
    ],
)
def test_refusals_name_place_and_choices(written: Any, says: str) -> None:
    with pytest.raises(ChatError) as told:
        normalise(written)
    assert says in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("role", ["system", "user"])
def test_markers_in_text_are_refused(marker: str, role: str) -> None:
    written = [{"role": role, "content": f"a {marker} b"}, {"role": "user", "content": "x"}]
    with pytest.raises(ChatError, match="only the chat template may write"):
        normalise(written, markers=MARKERS)


def test_other_angle_brackets_are_text() -> None:
    assert normalise("a <b> <|c|>", markers=MARKERS)[0]["content"][0]["text"] == "a <b> <|c|>"


def test_the_last_message_is_the_users() -> None:
    with pytest.raises(ChatError, match="message 1 is the last and comes from the assistant"):
        check_last(normalise([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]))


def test_a_turn_of_media_and_text() -> None:
    message = user_message("What?", images=["a", b"b"], audios=(SAMPLES, 8000), videos="c")
    assert [part["type"] for part in message["content"]] == ["image", "image", "video", "audio", "text"]
    assert message["content"][3]["audio"] == (SAMPLES, 8000)
    assert user_message(None, audios=[SAMPLES, SAMPLES])["content"][1]["audio"] is SAMPLES
    with pytest.raises(ChatError, match="not messages"):
        user_message([{"role": "user", "content": "x"}])
    with pytest.raises(ChatError, match="is empty"):
        user_message("")


def test_properties() -> None:
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    given, st = hypothesis.given, hypothesis.strategies
    keys = st.sampled_from(
        ["role", "content", "type", "text", "image", "audio", "image_url", "url", "input_audio", "x"]
    )
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.binary(max_size=3))
    values = st.one_of(scalars, st.sampled_from(["user", "system", "assistant", "text", "image", "audio_url"]))
    trees = st.recursive(
        values,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
        max_leaves=8,
    )

    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
    @given(trees)
    def anything_is_normal_or_one_line(written: Any) -> None:
        try:
            once = normalise(written, markers=MARKERS)
        except OmniFP4Error as error:
            assert "\n" not in str(error)
            return
        assert normalise(once, markers=MARKERS) == once
        assert all(isinstance(part, dict) and part["type"] in part for message in once for part in message["content"])

    texts = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4)

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
    @given(texts, st.booleans())
    def text_is_kept(parts: list[str], typed: bool) -> None:
        content: list[Any] = [{"type": "text", "text": part} if typed else part for part in parts]
        (message,) = normalise([{"role": "user", "content": content}])
        assert [part["text"] for part in message["content"]] == parts

    anything_is_normal_or_one_line()
    text_is_kept()
