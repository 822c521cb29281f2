"""The command line: thin verbs over the library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import typer

from omnifp4.cli import (
    bench,
    calibrate,
    convert,
    dataset,
    demo,
    doctor,
    engine,
    evaluate,
    plan,
    quantize,
    report,
    serve,
    speech_recipe,
    talk,
    verify,
)
from omnifp4.errors import OmniFP4Error, ProofError

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C: 128 and the number of the signal."""

LIBRARIES: Final = ("torch", "torchvision", "transformers", "safetensors", "accelerate")
"""Of the extra ``run``; verbs that only read and write files need none of them."""

app = typer.Typer(
    name="omnifp4",
    help="Take an omni-modal checkpoint to NVFP4, and prove that the result is right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("plan")(plan.plan)
app.command("quantize")(quantize.quantize)
app.command("dataset")(dataset.dataset)
app.command("calibrate")(calibrate.calibrate)
app.command("verify")(verify.verify)
app.command("convert")(convert.convert)
app.command("repair")(convert.repair)
app.command("generate")(talk.generate)
app.command("chat")(talk.chat)
app.command("serve")(serve.serve)
app.add_typer(engine.app, name="engine")
app.command("report")(report.report)
app.command("bench")(bench.bench)
app.command("evaluate")(evaluate.evaluate)
app.command("speech-recipe")(speech_recipe.speech_recipe)
app.command("doctor")(doctor.doctor)
app.command("diagnose")(doctor.diagnose)


def _version(wanted: bool) -> None:
    if wanted:
        from omnifp4.receipt.base import package_version

        typer.echo(f"omnifp4 {package_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Take an omni-modal checkpoint to NVFP4, and prove that the result is right."""


def run() -> None:
    """Entry point. Exit status 0: done or passed; 1: a check failed; 2: wrong usage or input; 130: interrupted."""
    _open_closed_streams()
    try:
        app()
    except OmniFP4Error as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except ProofError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer makes an exit status of an interrupt, and says nothing.
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        resumable = sys.argv[1:2] in (["quantize"], ["calibrate"], ["convert"], ["repair"])
        more = "; a run with --resume goes on where this one stopped" if resumable else ""
        if sys.argv[1:2] in (["evaluate"], ["speech-recipe"]):
            more = "; the same command goes on where this one stopped"
        sys.stderr.write(f"interrupted{more}\n")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone away; keep the interpreter from complaining about it at exit.
        _drop_stdout()
        sys.exit(1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in LIBRARIES:
            raise
        sys.stderr.write(f"error: {sys.argv[1]} needs {missing}, which is not installed (pip install 'omnifp4[run]')\n")
        sys.exit(2)
    except OSError as error:
        # What has a better name was given it below; this is a full disk behind stdout, or a lack of file descriptors.
        _drop_stdout()
        sys.stderr.write(f"error: {error.filename or 'output'}: {error.strerror or error}\n")
        sys.exit(2)


def _open_closed_streams() -> None:
    """Give a program that was started without stdout or stderr one that takes everything."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for the whole run


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
