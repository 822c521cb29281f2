"""omnifp4 bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output, check_receipt
from omnifp4.cli.talk import hush_libraries


def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A checkpoint folder or a Hub id; or see --synthetic.")
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Measure random weights of a real shape instead: qwen3-omni-30b-a3b or tiny."
        ),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="Of synthetic weights: nvfp4 or bf16.")] = "nvfp4",
    layers: Annotated[int | None, typer.Option(help="Cut a synthetic shape to so many decoder layers.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REFERENCE", help="A second model in the same run: a checkpoint; with --synthetic, nvfp4 or bf16."
        ),
    ] = None,
    parts: Annotated[
        str, typer.Option(help="What is loaded: text, thinker (with towers) or all (speech).")
    ] = "thinker",
    prefill: Annotated[str, typer.Option(help="Prompt lengths.")] = "64,2048",
    batch: Annotated[str, typer.Option(help="Sequences decoded at once.")] = "1,8,32",
    context: Annotated[str, typer.Option(help="Prompt lengths before decoding.")] = "64,4096,16384",
    new_tokens: Annotated[int, typer.Option(help="Tokens each sequence makes in a repeat.")] = 256,
    repeats: Annotated[int, typer.Option(help="Of every figure, 3 at least; warm-up comes before them.")] = 3,
    engine: Annotated[str, typer.Option(help="auto, modules or cuda-graph; what is named is never replaced.")] = "auto",
    against_engine: Annotated[str, typer.Option(help="Of the reference.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Shortest context and longest prompt only.")] = False,
    cell_seconds: Annotated[float, typer.Option(help="About how long the repeats of one figure may take.")] = 15.0,
    speech_seconds: Annotated[float, typer.Option(help="Sound made in a repeat, with --parts all.")] = 8.0,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and synthetic weights.")] = 0,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Load a running OpenAI-compatible server instead; MODEL is its name for a model."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="With --server: requests in all.")] = 32,
    rate: Annotated[
        float | None, typer.Option(help="With --server: arrivals a second; as fast as it answers if not given.")
    ] = None,
    arrivals: Annotated[str, typer.Option(help="With --server: constant, poisson or burst.")] = "poisson",
    concurrency: Annotated[int, typer.Option(min=1, help="With --server: most requests at once.")] = 8,
    mix: Annotated[
        str, typer.Option(help="With --server: kinds and weights, such as text=4,image=1,audio=1,video=1,speech=1.")
    ] = "text",
    max_tokens: Annotated[int, typer.Option(min=1, help="With --server: of each answer.")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="With --server: exactly --max-tokens tokens (vLLM's extension).")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="OMNIFP4_API_KEY", help="With --server: the key that it wants.")
    ] = None,
    receipt: Annotated[
        Path | None, typer.Option("--receipt", metavar="FILE", help="Write the record here too.")
    ] = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Measure memory, speed and speech beside what memory bandwidth allows. Exit status 1 if a check before it fails."""
    from omnifp4.api import bench as run
    from omnifp4.checkpoint.output import write_text
    from omnifp4.errors import OmniFP4Error, OutputError
    from omnifp4.report.bench_card import bench_text

    output = Output(as_json=as_json)
    check_receipt(receipt)
    if server is not None:
        from omnifp4.cli.bench_server import bench_server

        if synthetic is not None or against is not None:
            raise OmniFP4Error("--server loads a running server: --synthetic and --against do not go with it")
        bench_server(
            server,
            output=output,
            model=model,
            requests=requests,
            rate=rate,
            arrivals=arrivals,
            concurrency=concurrency,
            mix=mix,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            api_key=api_key or "",
            seed=seed,
            receipt=receipt,
        )
        return
    hush_libraries()
    result = run(
        model,
        synthetic=synthetic,
        format=format,
        layers=layers,
        against=against,
        parts=parts,
        prefill=prefill,
        batch=batch,
        context=context,
        new_tokens=new_tokens,
        repeats=repeats,
        engine=engine,
        against_engine=against_engine,
        device=device,
        quick=quick,
        cell_seconds=cell_seconds,
        speech_seconds=speech_seconds,
        seed=seed,
        revision=revision,
        progress=output.say,
    )
    if receipt is not None:
        try:
            write_text(receipt, result.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise OutputError(
                f"cannot write {receipt}: {error.strerror or error}", hint="give --receipt another path"
            ) from None
    output.result(result, bench_text(result))
    if not result.passed:
        raise typer.Exit(1)
