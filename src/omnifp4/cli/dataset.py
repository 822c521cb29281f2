"""omnifp4 dataset"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output
from omnifp4.cli.talk import hush_libraries


def dataset(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the set; must not exist.")],
    source: Annotated[
        str,
        typer.Option("--from", metavar="FILE", help="JSONL of conversations with media paths; or the bundled ones."),
    ] = "bundled",
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Conversations, evenly over modalities; 60 if not given.")
    ] = None,
    modality: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only these: text, image, audio, video, mixed; repeat for more."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Check and count with this checkpoint's processor, not the tiny model's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Make a calibration set of conversations: validated, copied with its media, hashed, tokens counted."""
    from omnifp4.api import dataset as make
    from omnifp4.report.calibration import set_text

    output = Output(as_json=as_json)
    hush_libraries()
    with output.steps("dataset") as steps:
        receipt = make(
            out, source=source, samples=samples, modalities=modality or (), model=model, seed=seed, progress=steps
        )
    output.result(receipt, set_text(receipt, str(out)))
    output.say(f"next: omnifp4 calibrate {shlex.quote(model or 'MODEL')} STATISTICS --data {shlex.quote(str(out))}")
