"""Wrong and hostile requests: right statuses, one form of error, nothing leaks, nothing crashes."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import gc
import json
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

import hostile


def send(client: Any, one: hostile.Hostile) -> Any:
    return client.request(one.method, one.path, content=one.body, headers=one.headers)


def test_five_hundred_hostile_requests(server: Any) -> None:
    """Right statuses, OpenAI's form of error, no word of our insides, and memory that does not grow."""
    from omnifp4.chat.meter import process_bytes

    requests = hostile.all_hostile(500)
    assert len(requests) == 500
    wrong: list[str] = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        # The first time, libraries load parts of themselves, and the largest request makes the heap as large as it gets.
        for one in requests:
            send(client, one)
        gc.collect()
        before = process_bytes()
        for one in requests:
            reply = send(client, one)
            if reply.status_code not in one.statuses:
                wrong.append(f"{one.says}: {reply.status_code} {reply.text[:100]}")
            elif reply.status_code != 200 and one.method != "HEAD":
                error = reply.json()["error"]
                if set(error) != {"message", "type", "param", "code"} or not error["message"]:
                    wrong.append(f"{one.says}: {error}")
            if any(word in reply.text for word in ("Traceback", "site-packages", 'File "', "root:x:0")):
                wrong.append(f"{one.says}: tells too much: {reply.text[:200]}")
        gc.collect()
        grown = process_bytes() / before - 1
        good = client.post(hostile.CHAT, json={"messages": hostile.HELLO, "max_tokens": 2, "temperature": 0})
    assert wrong == []
    assert good.status_code == 200 and server.service.scheduler.alive
    assert server.service.scheduler.running == server.service.scheduler.waiting == 0
    assert grown <= 0.05, f"memory grew by {grown:.1%}"


def test_errors_name_what_is_allowed(server: Any) -> None:
    with httpx.Client(base_url=server.url) as client:

        def told(**fields: Any) -> str:
            body = {"messages": hostile.HELLO, "max_tokens": 1, **fields}
            return str(client.post(hostile.CHAT, json=body).json()["error"]["message"])

        assert told(max_token=3).startswith("there is no field 'max_token' (allowed: model, messages,")
        assert told(n=3) == "n is not supported (allowed: 1)"
        assert "there is no model 'x' (allowed: tiny-omni)" in told(model="x")
        assert "there is no voice 'Bob' (allowed: " in told(modalities=["audio"], audio={"voice": "Bob"})
        assert "streamed (allowed: pcm16, wav)" in told(
            stream=True, modalities=["audio"], audio={"voice": "Ethan", "format": "mp3"}
        )
        url = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
        assert "fetches nothing (send a data URL, or start it with --allow-media-host)" in told(
            messages=[{"role": "user", "content": [url]}]
        )
        assert "together more than the context of" in told(messages=[{"role": "user", "content": "word " * 90_000}])


def test_an_error_of_ours_tells_nothing(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks inside, before or within an answer."""
    from omnifp4.chat.generation import TextRun
    from omnifp4.serve.preparation import Preparation

    secret = "/home/somebody/secret"

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError(secret)

    body = {"messages": hostile.HELLO, "max_tokens": 3, "temperature": 0}
    with httpx.Client(base_url=server.url) as client:
        for owner, name in ((Preparation, "_read_chat"), (TextRun, "open"), (TextRun, "collect")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, broken)
                reply = client.post(hostile.CHAT, json=body)
                assert reply.status_code == 500 and reply.json()["error"]["code"] == "internal_error"
                assert secret not in reply.text
        collect = TextRun.collect
        for before, status in ((0, 500), (2, 200)):
            calls: list[int] = []

            def later(run: Any, before: int = before, calls: list[int] = calls) -> Any:
                calls.append(1)
                return collect(run) if len(calls) <= before else broken()

            with monkeypatch.context() as patch:
                patch.setattr(TextRun, "collect", later)
                reply = client.post(hostile.CHAT, json={**body, "stream": True})
            assert reply.status_code == status, "a stream that has not begun has a status of its own"
            assert secret not in reply.text and "[DONE]" not in reply.text
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        assert len(events) > 1 and events[-1]["error"]["code"] == "internal_error"
        assert client.post(hostile.CHAT, json=body).status_code == 200
    assert server.service.scheduler.waiting == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_that_is_broken_says_so(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is told, whoever comes later is refused, and ``/health`` takes it out of service."""
    from omnifp4.serve.scheduler import Scheduler

    body = {"messages": hostile.HELLO, "max_tokens": 3}
    with start_server() as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.get("/health").status_code == 200
        monkeypatch.setattr(Scheduler, "_drop", lambda _: 1 / 0)
        for _ in range(2):
            reply = client.post(hostile.CHAT, json=body)
            assert reply.status_code == 500 and reply.json()["error"]["code"] == "internal_error"
        assert client.get("/health").status_code == 503


def test_damaged_weights_end_one_answer_only(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from omnifp4.decoding.sampling import Sampler, damaged

    pick = Sampler.pick
    poisoned = {"seed": 666}

    def watched(self: Sampler, ids: Any, logits: Any) -> int:
        if self._random is not None and self._random.initial_seed() == poisoned["seed"] and ids.shape[1] > 12:
            raise damaged(ids.shape[1])
        return pick(self, ids, logits)

    replies: dict[int, Any] = {}

    def ask(seed: int) -> None:
        body = {"messages": hostile.HELLO, "max_tokens": 24, "temperature": 1.0, "seed": seed, "ignore_eos": True}
        replies[seed] = httpx.post(server.url + hostile.CHAT, json=body, timeout=60)

    ask(1)
    alone = replies[1].json()["choices"][0]["message"]["content"]
    monkeypatch.setattr(Sampler, "pick", watched)
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 666, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies[666].status_code == 500 and "weights are damaged" in replies[666].text
    assert replies[2].status_code == 200
    assert replies[1].json()["choices"][0]["message"]["content"] == alone
