"""omnifp4 report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output


def report(
    receipts: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RECEIPTS", help="Files that verbs printed with --json, and artifact folders."),
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            "--out", "-o", help="report.html: one offline page; report.json: the gathered receipt. Repeatable."
        ),
    ] = None,
    card: Annotated[
        Path | None, typer.Option(metavar="ARTIFACT", help="Put what was measured into this artifact's model card.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write every picture there as an SVG file of its own.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Gather receipts of one artifact and show them: summary, one offline page, model card."""
    from omnifp4.report.summary import report_text
    from omnifp4.report.writing import write_report

    output = Output(as_json=as_json)
    receipt = write_report(receipts or (), out or (), card=card, pictures=pictures)
    output.result(receipt, report_text(receipt))
    for path in out or ():
        output.say(f"wrote {path}")
    if pictures is not None:
        output.say(f"wrote pictures into {pictures}")
    if card is not None:
        output.say(f"wrote what was measured into {card / 'README.md'}")
