"""omnifp4 calibrate"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output, check_receipt
from omnifp4.cli.talk import hush_libraries


def calibrate(
    model: options.Model,
    statistics: Annotated[Path, typer.Argument(metavar="STATISTICS", help="The file to be made; must not exist.")],
    data: Annotated[
        str,
        typer.Option(metavar="SET", help="What omnifp4 dataset made, a JSONL file, or the bundled conversations."),
    ] = "bundled",
    samples: Annotated[int | None, typer.Option(metavar="N", help="Only N of the set, evenly over modalities.")] = None,
    seed: Annotated[int, typer.Option(help="Of that choice.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    max_failed: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the samples may fail, 0 to 1; more abort with exit status 1.")
    ] = 0.05,
    least_tokens: Annotated[
        int, typer.Option(metavar="N", help="An expert with fewer routed tokens takes the all-expert statistics.")
    ] = 64,
    all_expert_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens that every expert gets beside its own; 0 leaves it at its own.")
    ] = 2048,
    block_hessians: Annotated[
        bool, typer.Option(help="Collect products within blocks of 16 inputs: sixteen times the size.")
    ] = True,
    speech: Annotated[
        bool | None,
        typer.Option(
            "--speech/--no-speech",
            help="Talker and code predictor too; if not given, where the talker fits into memory.",
        ),
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            help="Squared gradients of the thinker's weights too, for --choose-by gradient: all samples go back through "
            "the layers once.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run left in STATISTICS.partial.")
    ] = False,
    receipt: Annotated[
        Path | None, typer.Option("--receipt", metavar="FILE", help="Write the record here too.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Collect statistics of what every linear reads, layer by layer. Exit status 1 if too many samples fail."""
    # Read when torch is imported: threads that spin while they wait take the cores from those that read ahead.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from omnifp4.api import calibrate as run
    from omnifp4.checkpoint.output import write_text
    from omnifp4.errors import OutputError
    from omnifp4.report.calibration import calibration_text

    output = Output(as_json=as_json)
    check_receipt(receipt)
    if receipt is not None and receipt.resolve() == statistics.resolve():
        raise OutputError(f"--receipt is {receipt}, the statistics' own file", hint="choose another name")
    hush_libraries()
    with output.steps("calibrate") as steps:
        found = run(
            model, statistics, data=data, samples=samples, seed=seed, device=device, dtype=dtype,
            max_failed=max_failed, least_tokens=least_tokens, all_expert_tokens=all_expert_tokens,
            block_hessians=block_hessians, speech=speech, gradients=gradients, resume=resume, progress=steps,
        )  # fmt: skip
    if receipt is not None:
        try:
            write_text(receipt, found.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise OutputError(f"{receipt}: cannot be written: {error.strerror}") from None
    output.result(found, calibration_text(found, str(statistics)))
    output.say(
        f"next: omnifp4 quantize {shlex.quote(model)} OUT --recipe nvfp4-importance --statistics "
        f"{shlex.quote(str(statistics))}"
    )
