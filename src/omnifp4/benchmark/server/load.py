"""Sends a trace to a server, each request at its time and from a thread of its own, and keeps what came back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from omnifp4.benchmark.server.client import Answer, Server, ask, find_model, parse_server
from omnifp4.benchmark.server.figures import load_receipt
from omnifp4.benchmark.server.trace import PlannedRequest, TraceOptions, plan_trace, plan_warmup
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.server_load import ServerLoadReceipt

OnAnswer = Callable[[int, int, int], None]
"""Told of answers that have come, requests in all, and failures."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request and what became of it.

    Attributes:
        waited_s: how long after its arrival it was sent, because too many were under way.
    """

    request: PlannedRequest
    answer: Answer
    waited_s: float


def bench_server(
    url: str,
    options: TraceOptions | None = None,
    *,
    model: str = "",
    key: str = "",
    timeout_s: float = 300.0,
    on_answer: OnAnswer | None = None,
) -> ServerLoadReceipt:
    """Loads an OpenAI-compatible server with a trace.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        options: what to send; 32 texts, 8 at once, if not given.
        model: name that the server knows; its first if not given.
        key: API key.
        timeout_s: the longest silence in an answer.
        on_answer: told of the progress.

    Returns:
        The receipt. Failed requests are counted in it and are no exception.

    Raises:
        OmniFP4Error: nothing answers there, no request of the warm-up succeeds, or the options are not right.
    """
    options = options or TraceOptions()
    server = parse_server(url, key=key, timeout_s=timeout_s)
    requests = plan_trace(options)
    first, engine = find_model(server)
    name = model or first
    _warm_up(server, name, options)
    outcomes = run_trace(server, name, requests, options.concurrency, on_answer)
    return load_receipt(server.url, engine, name, options, outcomes)


def _warm_up(server: Server, model: str, options: TraceOptions) -> None:
    answers = [(request, ask(server, {"model": model, **request.body})) for request in plan_warmup(options)]
    failed = [(request, answer) for request, answer in answers if answer.error]
    if answers and len(failed) == len(answers):
        request, answer = failed[0]
        raise OmniFP4Error(
            f"{server.url}: every request of the warm-up failed; the first, of kind {request.kind}: {answer.error}",
            hint="read the server's log; --mix leaves a kind out",
        )


def run_trace(
    server: Server,
    model: str,
    requests: Sequence[PlannedRequest],
    concurrency: int,
    on_answer: OnAnswer | None = None,
) -> list[Outcome]:
    """Sends every request at its time, at most `concurrency` at once; outcomes are in the order of arrival."""
    places = threading.Semaphore(concurrency)
    lock = threading.Lock()
    done = failed = 0
    begin = time.perf_counter()

    def send(request: PlannedRequest, waited_s: float) -> Outcome:
        nonlocal done, failed
        try:
            answer = ask(server, {"model": model, **request.body})
        finally:
            places.release()
        with lock:
            done, failed = done + 1, failed + bool(answer.error)
            counts = (done, len(requests), failed)
        if on_answer is not None:
            on_answer(*counts)
        return Outcome(request, answer, waited_s)

    with ThreadPoolExecutor(concurrency, thread_name_prefix="bench-server") as pool:
        under_way = []
        for request in requests:
            if (early := request.arrives_s - (time.perf_counter() - begin)) > 0:
                time.sleep(early)
            places.acquire()
            # What arrives at the very start waits by design: only a stated rate can be missed.
            waited = time.perf_counter() - begin - request.arrives_s if request.arrives_s else 0.0
            under_way.append(pool.submit(send, request, max(0.0, waited)))
        return [future.result() for future in under_way]
