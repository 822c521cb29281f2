"""omnifp4 bench --server"""

from __future__ import annotations

from pathlib import Path

import typer

from omnifp4.cli.output import Output
from omnifp4.errors import OmniFP4Error


def bench_server(
    url: str,
    *,
    output: Output,
    model: str | None,
    requests: int,
    rate: float | None,
    arrivals: str,
    concurrency: int,
    mix: str,
    max_tokens: int,
    ignore_eos: bool,
    api_key: str,
    seed: int,
    receipt: Path | None,
) -> None:
    """Load a server and print the card. Exit status 1 if any request failed."""
    from omnifp4.benchmark.server import Arrivals, TraceOptions, parse_mix, server_load_text
    from omnifp4.benchmark.server import bench_server as run
    from omnifp4.benchmark.server.progress import LoadProgress
    from omnifp4.checkpoint.output import write_text

    if arrivals not in list(Arrivals):
        raise OmniFP4Error(f"arrivals {arrivals!r} is unknown", hint=f"known: {', '.join(Arrivals)}")
    options = TraceOptions(
        requests=requests,
        rate_per_s=rate,
        arrivals=Arrivals(arrivals),
        concurrency=concurrency,
        mix=parse_mix(mix),
        max_tokens=max_tokens,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    result = run(url, options, model=model or "", key=api_key, on_answer=LoadProgress(output.say).update)
    if receipt is not None:
        write_text(receipt, result.model_dump_json(indent=2) + "\n")
    output.result(result, server_load_text(result))
    if result.all_kinds.failed:
        raise typer.Exit(1)
