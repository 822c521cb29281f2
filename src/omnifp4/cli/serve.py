"""omnifp4 serve"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output
from omnifp4.errors import OmniFP4Error

ENGINES: Final = ("local", "vllm", "vllm-omni")
KEY_VARIABLE: Final = "OMNIFP4_API_KEY"

LOCAL_ONLY: Final = frozenset(
    {
        "max_waiting",
        "max_tokens",
        "max_request_seconds",
        "allow_media_host",
        "allow_media_folder",
        "allow_host",
        "speech",
        "decoding",
        "device",
        "revision",
    }
)
VLLM_ONLY: Final = frozenset(
    {
        "print_only",
        "python",
        "tensor_parallel",
        "gpu_memory_utilization",
        "emulate",
        "start_timeout",
        "stop_after_smoke",
        "extra",
    }
)


def serve(
    run: typer.Context,
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    engine: Annotated[str, typer.Option(help="local, or hand the artifact over to vllm or vllm-omni.")] = "local",
    print_only: Annotated[
        bool, typer.Option("--print", help="Show the command and files for vllm or vllm-omni, and run nothing.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; the folder's name if not given.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help=f"Clients must show this key; {KEY_VARIABLE} keeps it out of the process list.")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, max=256, help="Answers at once; 32 on a GPU and 8 elsewhere if not given.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait beside those.")] = 64,
    context: Annotated[
        int | None, typer.Option(min=16, help="The most tokens of a conversation with its answer.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of one answer.")] = 8192,
    max_speech_seconds: Annotated[
        float, typer.Option(min=0.1, max=3600, help="The most speech of one answer.")
    ] = 300.0,
    max_request_seconds: Annotated[float, typer.Option(min=1.0, help="The most time for one answer.")] = 600.0,
    allow_media_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Fetch media from this web server if a request names it; repeat for more."),
    ] = None,
    allow_media_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Read media from this folder if a request names them.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Name under which a proxy reaches this server on loopback; repeat for more."),
    ] = None,
    speech: Annotated[bool, typer.Option(help="Load the talker; without it answers cannot be spoken.")] = True,
    decoding: Annotated[str, typer.Option(help="What makes the text: auto, modules or cuda-graph.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 …; the GPU if there is one and it is not given.")
    ] = None,
    python: Annotated[
        Path | None, typer.Option(metavar="FILE", help="vllm: interpreter of an environment that has the engine.")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="vllm: GPUs that share the text decoder; all that fit if not given.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="vllm: share of each GPU's memory; what is free if not given.")
    ] = None,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="vllm: true W4A4 numerics without FP4 units; slow, for checks only.")
    ] = False,
    start_timeout: Annotated[
        float, typer.Option(min=1.0, help="vllm: seconds that the engine's start may take.")
    ] = 900,
    stop_after_smoke: Annotated[
        bool, typer.Option("--stop-after-smoke", help="vllm: end after one request in each modality.")
    ] = False,
    extra: Annotated[
        list[str] | None, typer.Option(help="vllm: an argument that the engine gets as it is; repeat for more.")
    ] = None,
    revision: options.Revision = None,
) -> None:
    """Serve MODEL to OpenAI's clients, with a chat page at /. Ctrl-C ends it."""
    if engine not in ENGINES:
        raise OmniFP4Error(f"there is no engine {engine!r}", hint=f"allowed: {', '.join(ENGINES)}")
    _refuse_foreign(run, engine)
    # An empty --api-key, as of a variable that is not set, must not open the server: the settings refuse it.
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE) or None
    if engine != "local":
        from omnifp4.handover import serve_with

        most = () if max_sequences is None else ("--max-num-seqs", str(max_sequences))
        wanted: dict[str, Any] = {
            "python": python,
            "max_model_len": context,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel": tensor_parallel,
            "max_speech_seconds": max_speech_seconds,
            "emulate": emulate,
            "start_timeout_s": start_timeout,
            "stop_after_smoke": stop_after_smoke,
            "served_model_name": name,
            "api_key": key,
            "extra": (*most, *(extra or ())),
        }
        raise typer.Exit(serve_with(model, engine, host=host, port=port, print_only=print_only, options=wanted))
    from omnifp4.checkpoint.hub import local_folder
    from omnifp4.cli.talk import hush_libraries
    from omnifp4.serve.settings import DEFAULT_NEW_TOKENS, Limits, Settings

    folder = local_folder(model, revision)
    limits = Limits(
        waiting=max_waiting,
        new_tokens=max_tokens,
        default_new_tokens=min(max_tokens, DEFAULT_NEW_TOKENS),
        speech_seconds=max_speech_seconds,
        request_seconds=max_request_seconds,
    )
    settings = Settings(
        name=name or (Path(model).resolve().name if Path(model).is_dir() else model),
        host=host,
        port=port,
        api_key=key,
        allow_hosts=tuple(allow_host or ()),
        media_hosts=tuple(allow_media_host or ()),
        media_folder=allow_media_folder,
        limits=limits,
    )
    output = Output(as_json=False)
    try:
        from omnifp4.serve.running import serve as serve_here
    except ImportError as error:
        raise OmniFP4Error(
            f"serving needs {error.name}, which is not installed", hint="pip install 'omnifp4[serve]'"
        ) from error
    hush_libraries()
    output.say(f"loading {folder}")
    serve_here(
        str(folder),
        settings,
        say=output.say,
        device=device,
        speech=speech,
        decoding=decoding,
        most_sequences=max_sequences,
        context_tokens=context,
    )


def _refuse_foreign(run: typer.Context, engine: str) -> None:
    """An option that the chosen engine does not have is refused, not passed over."""
    foreign = LOCAL_ONLY if engine != "local" else VLLM_ONLY
    for name in sorted(foreign):
        if (source := run.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
            option = "--print" if name == "print_only" else f"--{name.replace('_', '-')}"
            where = "the local engine" if foreign is LOCAL_ONLY else "--engine vllm and --engine vllm-omni"
            raise OmniFP4Error(f"{option} is for {where}, not for {engine!r}", hint="leave it out")
