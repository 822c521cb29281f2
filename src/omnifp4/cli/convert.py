"""omnifp4 convert and omnifp4 repair"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output

Artifact = Annotated[Path, typer.Argument(metavar="IN", help="The folder of a quantized checkpoint, made by any tool.")]


def convert(
    artifact: Artifact,
    out: options.Out,
    output_format: Annotated[str, typer.Option("--format", help="modelopt or compressed-tensors.")],
    resume: options.Resume = False,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Write an artifact in the other dialect: the same codes and block scales, config and ignore list rebuilt."""
    from omnifp4 import api
    from omnifp4.report.terminal import conversion_text

    output = Output(as_json=as_json)
    with output.progress("convert") as progress:
        receipt = api.convert(artifact, out, format=output_format, resume=resume, threads=threads, progress=progress)
    output.result(receipt, conversion_text(receipt, str(out)))
    output.say(f"next: omnifp4 verify {out}")


def repair(
    artifact: Artifact,
    out: options.Out,
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="The wide checkpoint it was made from: lost numbers are recomputed from it."
        ),
    ] = None,
    resume: options.Resume = False,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Mend known damage and verify the result, or say why it cannot be mended and exit with status 1."""
    from omnifp4 import api
    from omnifp4.receipt.base import Verdict
    from omnifp4.receipt.repair import RepairOutcome
    from omnifp4.report.terminal import repair_text, verification_text

    output = Output(as_json=as_json)
    with output.progress("repair") as progress:
        receipt = api.repair(artifact, out, source=source, resume=resume, threads=threads, progress=progress)
    output.result(receipt, repair_text(receipt, str(out)))
    if receipt.outcome is RepairOutcome.NOT_MENDED:
        raise typer.Exit(1)
    if receipt.outcome is RepairOutcome.MENDED:
        proof = api.verify(out, against=source, threads=threads)
        output.show(verification_text(proof))
        if proof.verdict is not Verdict.PASS:
            output.say(f"{out} was written but does not pass verify; see omnifp4 verify {out}")
            raise typer.Exit(1)
