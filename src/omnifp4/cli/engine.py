"""omnifp4 engine install and omnifp4 engine list"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli.output import Output

app = typer.Typer(
    help="Environments of other engines, apart from this package's own.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("install")
def install(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="vllm, or vllm-omni for speech.")],
    version: Annotated[str, typer.Option(help="Of the engine, if not the pinned one.")] = "",
    base: Annotated[Path | None, typer.Option(metavar="PYTHON", help="Interpreter to make it from.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Make it anew if it is there.")] = False,
) -> None:
    """Make a virtual environment with pinned versions of ENGINE: gigabytes of downloads, once."""
    from omnifp4.handover.environments import engine_folder
    from omnifp4.handover.environments import install as make

    output = Output(as_json=False)
    environment = make(engine, version=version, base=base, replace=replace, say=output.say)
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    output.show(f"{engine_folder(engine)}: {versions}")
    output.say(f"next: omnifp4 serve MODEL --engine {engine}")


@app.command("list")
def list_engines() -> None:
    """List the environments that were made, and what is in them."""
    from omnifp4.handover.environments import list_environments

    output = Output(as_json=False)
    found = list_environments()
    for engine, folder, environment in found:
        versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
        output.show(f"{engine}: {folder}: Python {environment.python_version}, {versions}")
    if not found:
        output.say("none; omnifp4 engine install vllm makes one")
