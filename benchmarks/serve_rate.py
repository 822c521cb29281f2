"""The server beside its own engine, in one process: tokens a second with many clients, and time to the first token with one.

    python benchmarks/serve_rate.py [--model FOLDER | --shape qwen3-omni-30b-a3b | --paced MS] [--clients 32] [--tokens 384]

Without --model, the text decoder of the given shape is made with random weights where it runs, and the tiny model's
tokenizer stands in for its own: every prompt has the same text, and every answer is made to its full length, so that
the engine alone and the server do the same work. With --paced an engine that computes nothing gives one token to every
sequence each so many milliseconds, one step ahead as the CUDA graph engine does: what is missing from its rate is the
server's own cost, on any machine. Clients run in a process of their own.

Two rates are compared. *Full*: tokens while all clients have an answer under way, beside steps of as many sequences.
*Whole*: all tokens from the first request to the last token, beside the same prompts and steps without a server.
Runs of both sides alternate; figures are medians with their extremes. Prints a line a figure and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from omnifp4.chat.inputs import ModelInputs
from omnifp4.chat.omni_chat import OmniChat
from omnifp4.decoding.engine import Engine, EngineFull, Sampling, Sequence
from omnifp4.serve.app import Service
from omnifp4.serve.running import listen, make_server, media_rules, open_service, settle_process
from omnifp4.serve.settings import Settings

NAME = "served"
SENTENCE = "Tell me a long story about a dragon and its friends. "
SHORT, LONG = SENTENCE * 4, SENTENCE * 80
FIRST_TOKEN_RUNS = 9
COLD_SECONDS = 0.05
"""Pause before each request of the measurement of first tokens: the load is low."""


class PacedEngine(Engine):
    """Makes arbitrary tokens at a fixed pace; the next step is under way while the last one's tokens are looked at."""

    name = "modules"
    reason = "paced"

    def __init__(self, step_seconds: float, prompt_seconds: float, most_sequences: int, context_tokens: int) -> None:
        self.most_sequences = most_sequences
        self.context_tokens = context_tokens
        self._step_seconds = step_seconds
        self._prompt_seconds = prompt_seconds
        self._under_way: dict[int, Sequence] = {}
        self._ready = 0.0
        """When the step that was started ahead is done."""

    def start(
        self, inputs: ModelInputs, sampling: Sampling, *, most_tokens: int, keep_states: bool = False
    ) -> Sequence:
        self.check_room(inputs, most_tokens)
        if len(self._under_way) >= self.most_sequences:
            raise EngineFull("full")
        self._sleep_until(max(time.perf_counter(), self._ready) + self._prompt_seconds)
        sequence = Sequence(inputs.prompt_tokens, most_tokens, [1])
        self._under_way[id(sequence)] = sequence
        return sequence

    def step(self, sequences: Iterable[Sequence] | None = None) -> None:
        chosen = list(self._under_way.values()) if sequences is None else list(sequences)
        now = time.perf_counter()
        due = self._ready if self._ready > now - self._step_seconds else now + self._step_seconds
        self._ready = max(now, due) + self._step_seconds
        self._sleep_until(due)
        for one in chosen:
            one.tokens.append(100 + (one.tokens[-1] * 31 + 7) % 1500)

    def stop(self, sequence: Sequence) -> None:
        self._under_way.pop(id(sequence), None)

    def close(self) -> None:
        self._under_way.clear()

    def _sleep_until(self, moment: float) -> None:
        if (left := moment - time.perf_counter()) > 0:
            time.sleep(left)


def tiny_folder() -> Path:
    """A checkpoint of the tiny omni model."""
    from omnifp4.tiny import write_tiny_omni

    return write_tiny_omni(Path(tempfile.mkdtemp()) / "tiny-omni")


def synthetic(shape: str, device: str) -> tuple[Any, Any]:
    """A text decoder of random weights, and a processor that can write prompts for it."""
    import torch

    from omnifp4.benchmark.synthetic import make_model
    from omnifp4.chat.loading import open_processor

    folder = tiny_folder()
    processor = open_processor(str(folder))
    model = make_model(shape, packed=True, parts="text", layers=None, seed=0, device=torch.device(device))
    tiny = json.loads((folder / "config.json").read_text())
    for name in ("im_start_token_id", "im_end_token_id", "user_token_id", "assistant_token_id", "system_token_id"):
        setattr(model.config, name, tiny[name])
    tokenizer, known = processor.tokenizer, len(processor.tokenizer) - 100
    decode = tokenizer.decode
    # The large vocabulary has tokens that the small tokenizer does not know.
    tokenizer.decode = lambda ids, **options: decode([token % known for token in ids], **options)
    return model, processor


def paced_service(settings: Settings, paced_ms: float, clients: int, context: int) -> Service:
    """The tiny model's processor before an engine that computes nothing."""
    engine = PacedEngine(paced_ms / 1000, 2.5 * paced_ms / 1000, clients, context)
    chat = OmniChat(str(tiny_folder()), device="cpu", speech=False, rules=media_rules(settings), context="refuse", engine=engine)  # fmt: skip
    return Service.start(chat, settings, most_sequences=clients, folder=None)


@dataclass(frozen=True)
class Alone:
    """The engine without a server: tokens a second of full steps, and of prompts and steps together."""

    full: float
    whole: float


def inputs_of(chat: OmniChat, text: str) -> ModelInputs:
    messages, _ = chat.read(text)
    inputs, _ = chat.start_text(messages, chat.options.changed(max_new_tokens=1), keep_states=False)
    return inputs


def engine_rate(chat: OmniChat, clients: int, tokens: int) -> Alone:
    inputs, engine = inputs_of(chat, SHORT), chat.engine
    began = time.perf_counter()
    under_way = [engine.start(inputs, Sampling(), most_tokens=tokens) for _ in range(clients)]
    stepping = time.perf_counter()
    for _ in range(tokens - 1):
        engine.step(under_way)
    ended = time.perf_counter()
    for sequence in under_way:
        engine.stop(sequence)
    return Alone(clients * (tokens - 1) / (ended - stepping), clients * tokens / (ended - began))


def engine_first_token(chat: OmniChat, inputs: ModelInputs) -> float:
    time.sleep(COLD_SECONDS)
    began = time.perf_counter()
    sequence = chat.engine.start(inputs, Sampling(), most_tokens=4)
    taken = time.perf_counter() - began
    for _ in range(3):
        chat.engine.step([sequence])
    chat.engine.stop(sequence)
    return taken


CLIENT = """
import asyncio, json, sys, time

class One(asyncio.Protocol):
    # A connection, kept for the next request as clients keep theirs.
    def connection_made(self, transport):
        self.transport, self.open = transport, True
    def ask(self, request):
        self.times, self.rest, self.status, self.used = [], b"", b"", 0
        self.over = asyncio.get_running_loop().create_future()
        self.sent = time.monotonic()
        self.transport.write(request)
        return self.over
    def data_received(self, data):
        now = time.monotonic()
        self.status = self.status or data[:12]
        whole, mark, self.rest = (self.rest + data).rpartition(b"\\n\\n")
        # An event has text, or is the opening one with none.
        made = whole.count(b'"content":"') - whole.count(b'"content":""')
        if made: self.times.append((now, made))
        if b'"usage":{' in whole:
            self.used = json.loads(whole[whole.rindex(b'data: {') + 6:].partition(b"\\n")[0])["usage"]["completion_tokens"]
        if data.endswith(b"0\\r\\n\\r\\n") and not self.over.done(): self.over.set_result(None)
    def connection_lost(self, error):
        self.open = False
        if hasattr(self, "over") and not self.over.done(): self.over.set_result(None)

async def main(port):
    loop = asyncio.get_running_loop()
    kept = []
    for line in sys.stdin:
        clients, tokens, text = json.loads(line)
        await asyncio.sleep(0.01)  # hears of connections that were closed
        body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}).encode()
        request = (f"POST /v1/chat/completions HTTP/1.1\\r\\nhost: 127.0.0.1\\r\\ncontent-type: application/json\\r\\n"
                   f"content-length: {len(body)}\\r\\n\\r\\n").encode() + body
        kept = [one for one in kept if one.open]
        while len(kept) < clients: kept.append((await loop.create_connection(One, "127.0.0.1", port))[1])
        asked = kept[:clients]
        await asyncio.gather(*[one.ask(request) for one in asked])
        assert all(one.status == b"HTTP/1.1 200" for one in asked), {one.status for one in asked}
        print(json.dumps([[one.sent, one.used, one.times] for one in asked]), flush=True)

asyncio.run(main(int(sys.argv[1])))
"""
"""Clients that note when each piece of text came; standard library only."""


@dataclass(frozen=True)
class Answer:
    """As one client saw it: when it asked, tokens by the server's count, and when how many pieces of text came."""

    sent: float
    tokens: int
    times: list[tuple[float, int]]

    @property
    def first(self) -> float:
        return self.times[0][0] - self.sent


class Clients:
    """A process of clients."""

    def __init__(self, port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def load(self, clients: int, tokens: int, text: str) -> list[Answer]:
        """So many answers at once."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([clients, tokens, text]) + "\n")
        self._process.stdin.flush()
        answers = [
            Answer(sent, used, [(when, made) for when, made in times])
            for sent, used, times in json.loads(self._process.stdout.readline())
        ]
        if any(one.tokens != tokens for one in answers):
            raise SystemExit(
                f"answers of {sorted({one.tokens for one in answers})} tokens where {tokens} were asked for"
            )
        return answers

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def server_rate(answers: list[Answer]) -> Alone:
    """Tokens a second while all were under way, and over all."""
    begin, end = max(one.times[0][0] for one in answers), min(one.times[-1][0] for one in answers)
    tokens = 0.0
    for one in answers:
        # Some tokens are half a character: a piece then has more than one.
        share = one.tokens / sum(made for _, made in one.times)
        tokens += share * sum(made for when, made in one.times if begin < when <= end)
    wall = max(one.times[-1][0] for one in answers) - min(one.sent for one in answers)
    return Alone(tokens / (end - begin), sum(one.tokens for one in answers) / wall)


def thread_seconds() -> dict[str, float]:
    """Processor seconds of this process by thread; empty where the system does not tell."""
    found: dict[str, float] = {}
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    tasks = Path("/proc/self/task")
    for task in tasks.iterdir() if tasks.exists() else ():
        numbers = (task / "stat").read_text().rpartition(")")[2].split()
        name = names.get(int(task.name), "others")
        found[name] = found.get(name, 0.0) + (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def measure(service: Service, clients: Clients, count: int, tokens: int, repeats: int) -> dict[str, Any]:
    chat = service.chat
    figures: dict[str, Any] = {}
    for name, text in (("short", SHORT), ("long", LONG)):
        inputs = inputs_of(chat, text)
        alone, served = [], []
        for run in range(FIRST_TOKEN_RUNS + 2):
            first = engine_first_token(chat, inputs)
            time.sleep(COLD_SECONDS)
            answer = clients.load(1, 4, text)[0].first
            if run >= 2:
                alone.append(first)
                served.append(answer)
        figures |= {
            f"{name}_prompt_tokens": inputs.prompt_tokens,
            f"{name}_engine_first_token_s": spread(alone),
            f"{name}_server_first_token_s": spread(served),
            f"{name}_first_token_ratio": median(served) / median(alone),
        }
    engine_rate(chat, count, 16)
    clients.load(count, 16, SHORT)
    alone_rates, served_rates = [], []
    worked: dict[str, float] = {}
    for _ in range(repeats):
        alone_rates.append(engine_rate(chat, count, tokens))
        before = thread_seconds()
        served_rates.append(server_rate(clients.load(count, tokens, SHORT)))
        for thread, seconds in thread_seconds().items():
            worked[thread] = worked.get(thread, 0.0) + seconds - before.get(thread, 0.0)
    for kind in ("full", "whole"):
        mine, own = [getattr(one, kind) for one in served_rates], [getattr(one, kind) for one in alone_rates]
        figures |= {
            f"{kind}_engine_tokens_per_s": spread(own),
            f"{kind}_server_tokens_per_s": spread(mine),
            f"{kind}_server_share": median(mine) / median(own),
        }
    steps = repeats * tokens
    figures["server_ms_per_step_by_thread"] = {
        name: 1000 * seconds / steps for name, seconds in sorted(worked.items()) if seconds > 0
    }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path)
    what.add_argument("--shape", default="qwen3-omni-30b-a3b")
    what.add_argument("--paced", type=float, metavar="MS")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--context", type=int, default=4096)
    arguments = parser.parse_args()
    import torch

    settings = Settings(name=NAME, port=0)
    taken = listen(settings)
    began = time.perf_counter()
    if arguments.paced is not None:
        service = paced_service(settings, arguments.paced, arguments.clients, arguments.context)
    else:
        model, processor = str(arguments.model), None
        if arguments.model is None:
            model, processor = synthetic(arguments.shape, arguments.device)
        service = open_service(
            model, settings, processor=processor, device=arguments.device, speech=False, decoding=arguments.engine,
            most_sequences=arguments.clients, context_tokens=arguments.context,
        )  # fmt: skip
    print(f"ready after {time.perf_counter() - began:.1f} s", file=sys.stderr)
    settle_process()
    server = make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True, name="event loop")
    thread.start()
    while not server.started:
        time.sleep(0.05)
    clients = Clients(taken.getsockname()[1])
    cuda = arguments.device.startswith("cuda") and arguments.paced is None
    figures = {
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "engine": "paced" if arguments.paced is not None else service.chat.engine.name,
        "clients": arguments.clients,
        "tokens": arguments.tokens,
        "repeats": arguments.repeats,
        **measure(service, clients, arguments.clients, arguments.tokens, arguments.repeats),
    }
    clients.close()
    server.should_exit = True
    thread.join()
    service.close()
    taken.close()
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {one:.4g}" for key, one in value.items())
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
