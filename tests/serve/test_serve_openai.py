"""OpenAI's own client against the server: text, pictures, sound, video, speech, streams, and leaving early."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import base64
import copy
import io
import json
import threading
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

openai = pytest.importorskip("openai", reason="openai is not installed")

import serve_media as made

MODEL = "tiny-omni"
HELLO = [{"role": "user", "content": "Tell me a story."}]
GREEDY = {"model": MODEL, "temperature": 0.0}


def asked(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def answer(client: Any, messages: Any = HELLO, **options: Any) -> str:
    return str(
        client.chat.completions.create(messages=messages, **{**GREEDY, "max_tokens": 8, **options})
        .choices[0]
        .message.content
    )


def streamed(client: Any, messages: Any = HELLO, **options: Any) -> list[Any]:
    return list(
        client.chat.completions.create(messages=messages, stream=True, **{**GREEDY, "max_tokens": 8, **options})
    )


def samples_of(data: bytes) -> np.ndarray[Any, Any]:
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def test_models(client: Any) -> None:
    assert [one.id for one in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "omnifp4"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'"):
        client.models.retrieve("gpt-9")


def test_text_is_that_of_chat(client: Any, server: Any) -> None:
    reply = client.chat.completions.create(messages=HELLO, **GREEDY, max_tokens=8)
    alone = server.service.chat.complete("Tell me a story.", max_new_tokens=8, temperature=0)
    assert reply.choices[0].message.content == alone.text
    assert reply.choices[0].finish_reason == "length" and reply.object == "chat.completion"
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (alone.stats.prompt_tokens, 8)
    assert usage.total_tokens == usage.prompt_tokens + 8


def test_stream_is_the_whole(client: Any) -> None:
    chunks = streamed(client, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer(client)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in streamed(client))


def test_history_and_system_shape_the_answer(client: Any) -> None:
    plain = answer(client)
    assert answer(client, [{"role": "developer", "content": "Be brief."}, *HELLO]) != plain
    turns = [*HELLO, {"role": "assistant", "content": plain}, {"role": "user", "content": "Go on."}]
    assert answer(client, turns) != plain
    empty = [*HELLO, {"role": "assistant", "content": None}, {"role": "user", "content": "Go on."}]
    assert answer(client, empty), "an earlier answer without text is left out"


def test_vision(client: Any) -> None:
    texts = {
        answer(client, asked([made.image_part(seed=seed), {"type": "text", "text": "What is this?"}]))
        for seed in (1, 2)
    }
    assert len(texts) == 2, "the picture shapes the answer"


def test_sound(client: Any) -> None:
    reply = client.chat.completions.create(messages=asked([made.audio_part(2.0)]), **GREEDY, max_tokens=8)
    assert reply.usage.prompt_tokens_details.audio_tokens == 26
    other = client.chat.completions.create(messages=asked([made.audio_part(2.0, 2000.0)]), **GREEDY, max_tokens=8)
    assert reply.choices[0].message.content != other.choices[0].message.content


def test_video(client: Any, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    url = made.data_url(made.mp4(tmp_path), "video/mp4")
    part = {"type": "video_url", "video_url": {"url": url}}
    reply = client.chat.completions.create(
        messages=asked([part, {"type": "text", "text": "What?"}]), **GREEDY, max_tokens=4
    )
    assert reply.usage.prompt_tokens > 14 and reply.usage.completion_tokens == 4


def test_sampling_and_stops(client: Any) -> None:
    whole = answer(client, max_tokens=20)
    again = [answer(client, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]
    assert len({answer(client, temperature=1.5) for _ in range(3)}) > 1, "without a seed each answer is another"
    cut = whole[len(whole) // 2 :][:4]
    reply = client.chat.completions.create(messages=HELLO, **GREEDY, max_completion_tokens=20, stop=[cut, "never"])
    assert reply.choices[0].message.content == whole[: whole.index(cut)]
    assert reply.choices[0].finish_reason == "stop"
    assert answer(client, extra_body={"top_k": 1}, temperature=1.0) == answer(client)


def test_spoken_answer(client: Any, server: Any) -> None:
    options = {**GREEDY, "max_tokens": 6, "modalities": ["text", "audio"], "seed": 5}
    reply = client.chat.completions.create(messages=HELLO, audio={"voice": "Ethan", "format": "wav"}, **options)
    message = reply.choices[0].message
    assert message.content is None and message.audio.transcript == answer(client, max_tokens=6)
    samples = samples_of(base64.b64decode(message.audio.data))
    assert reply.usage.completion_tokens_details.audio_tokens == round(len(samples) / 1920)
    alone = server.service.chat.complete(
        "Tell me a story.", speak="Ethan", max_new_tokens=6, temperature=0, seed=5, max_speech_seconds=1.0
    )
    assert alone.waveform is not None and len(alone.waveform) == len(samples)
    # What is decoded in pieces differs from the whole by the rounding of kernels that see other lengths.
    assert np.abs(samples / 32767 - alone.waveform).max() < 0.02
    other = client.chat.completions.create(messages=HELLO, audio={"voice": "chelsie", "format": "wav"}, **options)
    assert other.choices[0].message.audio.data != message.audio.data
    turns = [*HELLO, {"role": "assistant", "audio": {"id": message.audio.id}}, {"role": "user", "content": "Go on."}]
    repeated = [HELLO[0], {"role": "assistant", "content": message.audio.transcript}, turns[2]]
    assert answer(client, turns) == answer(client, repeated), "an earlier answer is known by its id"


def test_spoken_stream(client: Any) -> None:
    options = {"max_tokens": 6, "modalities": ["text", "audio"], "seed": 5}
    chunks = streamed(client, audio={"voice": "Ethan", "format": "pcm16"}, **options)
    deltas = [chunk.model_dump(exclude_none=True)["choices"][0]["delta"] for chunk in chunks]
    audio = [delta["audio"] for delta in deltas if "audio" in delta]
    assert "".join(one.get("transcript", "") for one in audio) == answer(client, max_tokens=6)
    pieces = [base64.b64decode(one["data"]) for one in audio if "data" in one]
    assert len(pieces) > 1 or len(pieces[0]) > 1920, "speech comes"
    assert "expires_at" in audio[-1] and len({one["id"] for one in audio}) == 1
    reply = client.chat.completions.create(
        messages=HELLO, audio={"voice": "Ethan", "format": "pcm16"}, **GREEDY, **options
    )
    assert base64.b64decode(reply.choices[0].message.audio.data) == b"".join(pieces)


@pytest.mark.parametrize(
    ("form", "magic"), [("wav", b"RIFF"), ("flac", b"fLaC"), ("mp3", b"\xff"), ("opus", b"OggS"), ("pcm", b"")]
)
def test_text_to_speech(client: Any, form: str, magic: bytes) -> None:
    data = client.audio.speech.create(
        model=MODEL, voice="Aiden", input="The dragon flew.", response_format=form, extra_body={"seed": 1}
    ).read()
    assert data.startswith(magic) and len(data) > 1000
    if form == "pcm":
        assert len(data) % 2 == 0 and np.frombuffer(data, "<i2").std() > 0


def test_text_to_speech_is_mp3_unless_asked_for(client: Any) -> None:
    reply = client.audio.speech.create(model=MODEL, voice="Ethan", input="The dragon flew.")
    assert reply.response.headers["content-type"] == "audio/mpeg" and reply.read()[:1] == b"\xff"


def test_text_to_speech_follows_its_text(client: Any) -> None:
    def say(text: str) -> bytes:
        return bytes(
            client.audio.speech.create(
                model=MODEL, voice="Ethan", input=text, response_format="pcm", extra_body={"seed": 1}
            ).read()
        )

    assert say("One.") == say("One.") != say("Two.")


def test_requests_of_open_webui(server: Any) -> None:
    """What its backend sends, without OpenAI's library: parameters set to nothing, and its own `min_p`."""
    httpx = pytest.importorskip("httpx", reason="httpx is not installed")
    key = {"authorization": "Bearer sk-none"}
    listed = httpx.get(f"{server.url}/v1/models", headers=key).json()
    assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == [MODEL]
    body = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is this?"}, made.image_part()]},
            {"role": "assistant", "content": "Noise."},
            {"role": "user", "content": "Sure?"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.7,
        "top_p": 0.9,
        "min_p": 0.0,
        "max_tokens": 6,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "reasoning_effort": "medium",
        "seed": 3,
        "stop": [],
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": None,
    }
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=key, timeout=60)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"), reply.text
    lines = [line for line in reply.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] <= 6
    title = {"model": MODEL, "messages": HELLO, "stream": False, "max_completion_tokens": 5}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=title, headers=key).json()["choices"]
    bare = {**dict.fromkeys(body), "messages": HELLO, "max_tokens": 2}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=bare).status_code == 200, "null is nothing"


def test_eight_streams_at_once(server: Any, client: Any) -> None:
    """Each equals what it gives alone, and they are really made together."""
    questions = [f"Tell me about number {number}." for number in range(8)]
    alone = [server.service.chat.complete(one, max_new_tokens=16, temperature=0).tokens for one in questions]
    chat = server.service.chat
    texts = [chat.processor.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in alone]
    got: dict[int, str] = {}
    together: list[int] = []

    def run(number: int) -> None:
        pieces = []
        for chunk in client.chat.completions.create(
            messages=asked(questions[number]), stream=True, **GREEDY, max_tokens=16
        ):
            pieces.append(chunk.choices[0].delta.content or "")
            together.append(server.service.scheduler.running)
        got[number] = "".join(pieces)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(8)] == texts
    assert max(together) >= 4, "continuous batching"


def test_warming_up_sees_every_number_of_answers(server: Any) -> None:
    """Up to the most at once, and nothing stays behind; an engine with fewer places is taken as far as it goes."""
    from omnifp4.decoding.module_engine import ModuleEngine
    from omnifp4.serve.running import warm_up

    class Watched(ModuleEngine):
        def step(self, sequences: Any = None) -> None:
            numbers.append(len(sequences))
            super().step(sequences)

    for places, seen in ((64, [1, 2, 4, 6]), (4, [1, 2, 4])):
        numbers: list[int] = []
        chat = copy.copy(server.service.chat)
        chat.engine = Watched(chat.model)
        chat.engine.most_sequences = places
        warm_up(chat, 6)
        assert numbers[: len(seen)] == seen and set(numbers) == set(seen)
        assert not chat.engine._under_way


def test_text_goes_on_while_another_is_spoken(server: Any, client: Any) -> None:
    speech = threading.Thread(
        target=lambda: server.client().audio.speech.create(model=MODEL, voice="Ethan", input="Hello there.").read()
    )
    speech.start()
    while not server.service.metrics.registry.get_sample_value("omnifp4_answers_speaking"):
        time.sleep(0.001)
    began = time.monotonic()
    chunks = streamed(client, max_tokens=4)
    assert len(chunks) > 2 and (speech.is_alive() or time.monotonic() - began < 1.0)
    speech.join()


def test_leaving_a_stream_ends_the_work(server: Any, client: Any) -> None:
    stream = client.chat.completions.create(
        messages=HELLO, stream=True, **GREEDY, max_tokens=8000, extra_body={"ignore_eos": True}
    )
    for _, _ in zip(range(3), stream, strict=False):
        pass
    assert server.service.scheduler.running == 1
    stream.close()
    wait_until_idle(server)


def test_leaving_without_a_stream_ends_the_work(server: Any) -> None:
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.5).chat.completions.create(
            messages=HELLO, **GREEDY, max_tokens=8000, extra_body={"ignore_eos": True}
        )
    wait_until_idle(server)


def wait_until_idle(server: Any) -> None:
    deadline = time.monotonic() + 5
    scheduler = server.service.scheduler
    while scheduler.running or scheduler.waiting:
        assert time.monotonic() < deadline, "the work goes on for nobody"
        time.sleep(0.01)
    assert not server.service.chat.engine._under_way
