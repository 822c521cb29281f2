"""The server beside its own engine: tokens a second with many clients, and time to the first token with one.

    python benchmarks/serve_rate.py [--model FOLDER | --shape qwen3-omni-30b-a3b] [--clients 32] [--tokens 256]

Without --model a model of the given shape is made with random weights where it runs, and the tiny model's tokenizer
stands in for its own: every prompt has the same text, and every answer is made to its full length, so that the engine
alone and the server do the same work. Clients run in a process of their own. Prints a line a figure and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from omnifp4.decoding.engine import Engine, Sampling
from omnifp4.serve.app import Service
from omnifp4.serve.running import listen, make_server, open_service
from omnifp4.serve.settings import Settings

NAME = "served"
QUESTION = "Tell me a long story about a dragon and its friends. " * 4


def synthetic(shape: str, device: str) -> tuple[Any, Any, Path]:
    """A model of random weights, a processor that can write prompts for it, and the folder of that processor."""
    import torch

    from omnifp4.benchmark.synthetic import make_model
    from omnifp4.chat.loading import open_processor
    from omnifp4.tiny import write_tiny_omni

    folder = write_tiny_omni(Path(tempfile.mkdtemp()) / "tiny-omni")
    processor = open_processor(str(folder))
    model = make_model(shape, packed=True, parts="thinker", layers=None, seed=0, device=torch.device(device))
    tiny = json.loads((folder / "config.json").read_text())
    for name in ("im_start_token_id", "im_end_token_id", "user_token_id", "assistant_token_id", "system_token_id"):
        setattr(model.config, name, tiny[name])
    tokenizer, known = processor.tokenizer, len(processor.tokenizer) - 100
    decode = tokenizer.decode
    # The large vocabulary has tokens that the small tokenizer does not know.
    tokenizer.decode = lambda ids, **options: decode([token % known for token in ids], **options)
    return model, processor, folder


def engine_alone(service: Service, clients: int, tokens: int) -> tuple[float, float]:
    """Tokens a second with so many sequences under way, and seconds to the first token of one; medians of three."""
    chat = service.chat
    messages, _ = chat.read(QUESTION)
    options = chat.options.changed(max_new_tokens=tokens, temperature=0.0)
    inputs, _ = chat.start_text(messages, options, keep_states=False)
    engine: Engine = chat.engine
    rates, firsts = [], []
    for _ in range(3):
        began = time.perf_counter()
        under_way = [engine.start(inputs, Sampling(), most_tokens=tokens)]
        firsts.append(time.perf_counter() - began)
        under_way += [engine.start(inputs, Sampling(), most_tokens=tokens) for _ in range(clients - 1)]
        began = time.perf_counter()
        for _ in range(tokens - 1):
            engine.step(under_way)
        rates.append(clients * (tokens - 1) / (time.perf_counter() - began))
        for sequence in under_way:
            engine.stop(sequence)
    return median(rates), median(firsts)


CLIENT = """
import http.client, json, sys, threading, time
port, clients, tokens, rounds, text = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0,
                   "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}})
rows = []
def run():
    for _ in range(rounds):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        sent = time.monotonic()
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == 200, reply.read()
        first = last = made = 0
        for line in reply:
            if b'"content":"' in line and b'"content":""' not in line:
                last = time.monotonic()
                first = first or last
            elif b'"usage":{' in line:
                made = json.loads(line[6:])["usage"]["completion_tokens"]
        rows.append((sent, first, last, made))
threads = [threading.Thread(target=run) for _ in range(clients)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(rows))
"""
"""Clients that note when the first and last text came; standard library only."""


def load(port: int, clients: int, tokens: int, rounds: int) -> list[tuple[float, float, float, int]]:
    """Rows of seconds sent, first, last, and tokens made."""
    arguments = [str(port), str(clients), str(tokens), str(rounds), QUESTION]
    done = subprocess.run([sys.executable, "-c", CLIENT, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the clients failed: {done.stderr[-2000:]}")
    return [(*row[:3], row[3]) for row in json.loads(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", default="qwen3-omni-30b-a3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--context", type=int, default=4096)
    arguments = parser.parse_args()
    import torch

    if arguments.model is None:
        model, processor, folder = synthetic(arguments.shape, arguments.device)
    else:
        model, processor, folder = str(arguments.model), None, arguments.model
    settings = Settings(name=NAME, port=0)
    taken = listen(settings)
    service = open_service(
        model,
        settings,
        processor=processor,
        device=arguments.device,
        speech=False,
        decoding=arguments.engine,
        most_sequences=arguments.clients,
        context_tokens=arguments.context,
        folder=folder,
    )
    server = make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = taken.getsockname()[1]
    alone, first_alone = engine_alone(service, arguments.clients, arguments.tokens)
    load(port, 1, 8, 1)
    first_served = median(row[1] - row[0] for row in load(port, 1, 8, 7))
    rows = load(port, arguments.clients, arguments.tokens, arguments.rounds)
    made = sum(row[3] for row in rows)
    wall = max(row[2] for row in rows) - min(row[0] for row in rows)
    # What one client sees of tokens after its first, times the clients: reading of prompts counts in `wall_rate` only.
    per_token = median((row[2] - row[1]) / (row[3] - 1) for row in rows)
    figures = {
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "engine": service.chat.engine.name,
        "clients": arguments.clients,
        "tokens": arguments.tokens,
        "engine_tokens_per_s": alone,
        "server_tokens_per_s": arguments.clients / per_token,
        "server_wall_tokens_per_s": made / wall,
        "server_share": arguments.clients / per_token / alone,
        "server_wall_share": made / wall / alone,
        "engine_first_token_s": first_alone,
        "server_first_token_s": first_served,
        "first_token_ratio": first_served / first_alone,
    }
    server.should_exit = True
    thread.join()
    service.close()
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
