"""omnifp4 verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output


def verify(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="The folder of a quantized checkpoint, made by any tool.")
    ],
    against: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="The wide checkpoint it was made from: compares every tensor.")
    ] = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Prove an artifact from its files alone. Exit status 1 if a check fails."""
    from omnifp4.receipt.base import Verdict
    from omnifp4.report.terminal import verification_text
    from omnifp4.verification import verify as prove

    output = Output(as_json=as_json)
    with output.progress("verify") as progress:
        receipt = prove(artifact, against=against, threads=threads, progress=progress)
    output.result(receipt, verification_text(receipt))
    if receipt.verdict is not Verdict.PASS:
        raise typer.Exit(1)
