"""omnifp4 quantize"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output
from omnifp4.cli.talk import hush_libraries


def quantize(
    model: options.Model,
    out: options.Out,
    recipe: options.RecipeName = "nvfp4",
    output_format: options.Format = "modelopt",
    rule: options.Rule = None,
    component: options.Components = None,
    effective_bits: options.EffectiveBits = None,
    count_bits: options.Counted = None,
    choose_by: options.ChooseBy = None,
    sensitivity: options.SensitivityMap = None,
    statistics: options.StatisticsFile = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="A calibration set (folder of dataset, JSONL file, or bundled) to run through the model beside the work.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Of that run: auto, cpu, cuda …")] = "auto",
    max_shard_size: options.ShardSize = "5GB",
    resume: options.Resume = False,
    threads: options.Threads = None,
    check: Annotated[bool, typer.Option(help="Prove the artifact from its files before OUT appears.")] = True,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Write a checkpoint in NVFP4. Streams tensor by tensor; OUT appears only when it is whole and checked."""
    from omnifp4.api import quantize as make_artifact
    from omnifp4.report.terminal import quantization_text

    output = Output(as_json=as_json)
    if data is not None:
        hush_libraries()
    with output.progress("quantize") as progress:
        receipt = make_artifact(
            model,
            out,
            recipe=recipe,
            rule=rule,
            components=component or (),
            format=output_format,
            max_shard_bytes=options.parse_size(max_shard_size),
            effective_bits=effective_bits,
            counted=count_bits,
            choose_by=choose_by,
            sensitivity=sensitivity,
            statistics=statistics,
            data=data,
            device=device,
            resume=resume,
            threads=threads,
            check=check,
            revision=revision,
            progress=progress,
        )
    output.result(receipt, quantization_text(receipt, str(out)))
    against = f" --against {shlex.quote(model)}" if Path(model).is_dir() else ""
    output.say(f"next: omnifp4 verify {shlex.quote(str(out))}{against}")
