"""An OpenAI-compatible server over a loaded model, as much of one as lm-eval asks for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@contextmanager
def serve(thinker: Any, *, logprobs: bool = True, said: str = "5") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serves until the block ends.

    Args:
        thinker: gives the log-probabilities of prompts of token ids.
        logprobs: give them; without, a server that cannot is played.
        said: every answer at the chat endpoint.

    Yields:
        The address, and the bodies of requests as they come.
    """
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.answer({"data": [{"id": "the-model"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            if self.path.endswith("/chat/completions"):
                self.answer({"choices": [{"index": 0, "message": {"content": said}}]})
                return
            choices = [{"index": number, "text": "", **scores(prompt)} for number, prompt in enumerate(body["prompt"])]
            self.answer({"choices": choices})

        def answer(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def scores(prompt: list[int]) -> dict[str, Any]:
        if not logprobs:
            return {"logprobs": None}
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logs = thinker(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float().log_softmax(-1)
        likeliest, own = logs.max(-1).values.tolist(), [logs[place, token] for place, token in enumerate(prompt[1:])]
        # The prompt's tokens, the first of which nothing foretells, and one that was made.
        return {
            "logprobs": {
                "token_logprobs": [None, *map(float, own), 0.0],
                "top_logprobs": [None, *({"x": value} for value in likeliest[:-1]), {"x": 0.0}],
            }
        }

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", bodies
        finally:
            server.shutdown()
            thread.join()
