"""omnifp4 doctor and omnifp4 diagnose"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output


def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A checkpoint folder or a Hub id.")] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Judge for a GPU of this memory, such as 24GB, instead of the one here.")
    ] = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Say what is installed, which engine can run MODEL here and how, and what fits. Exit status 1 if none can."""
    from omnifp4.doctor import run_doctor
    from omnifp4.doctor.text import doctor_text

    output = Output(as_json=as_json)
    memory = options.parse_size(device_memory) if device_memory else None
    receipt = run_doctor(model, device_memory=memory, revision=revision)
    output.result(receipt, doctor_text(receipt))
    if not receipt.can_run:
        raise typer.Exit(1)


def diagnose(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="A Python script of yours that fails or hangs.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]", help="Its arguments, after --.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, help="Stop the script after this many seconds.")] = None,
    stall: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a sign of life that count as a stall.")
    ] = 120.0,
    as_json: options.Json = False,
) -> None:
    """Run SCRIPT under watch and explain its failure, stall or silent mistake. Exit status 1 if anything was found."""
    from omnifp4.doctor import run_diagnose
    from omnifp4.doctor.text import diagnosis_text

    output = Output(as_json=as_json)
    receipt = run_diagnose(script, arguments or (), timeout=timeout, stall_seconds=stall, on_output=output.say)
    output.result(receipt, diagnosis_text(receipt))
    if not receipt.healthy:
        raise typer.Exit(1)
