"""omnifp4 speech-recipe"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output, check_receipt
from omnifp4.cli.talk import hush_libraries
from omnifp4.errors import OmniFP4Error


def speech_recipe(
    model: options.Model,
    recipe: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to be made, a .json; must not exist.")],
    data: Annotated[
        str,
        typer.Option(metavar="SET", help='JSONL of conversations with answers and "speak": true; or the bundled ones.'),
    ] = "bundled",
    samples: Annotated[int | None, typer.Option(metavar="N", help="Only the first N of each task.")] = None,
    base: Annotated[str, typer.Option(metavar="RECIPE", help="What happens to the thinker.")] = "nvfp4",
    schemes: Annotated[
        str, typer.Option(metavar="NAMES", help="To try, of nvfp4, mxfp4, fp8, int8, separated by commas.")
    ] = "nvfp4,fp8",
    times_floor: Annotated[
        float, typer.Option(metavar="X", help="A divergence up to X times the noise floor's is borne.")
    ] = 10.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where results are kept while it runs, and the reference's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the confidence intervals.")] = 0,
    receipt: Annotated[
        Path | None, typer.Option("--receipt", metavar="FILE", help="Write the record here too.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Make a recipe of what a model's speech bears: talker and code predictor, component by component."""
    from omnifp4.api import speech_recipe as search
    from omnifp4.checkpoint.output import write_text
    from omnifp4.errors import OutputError
    from omnifp4.report.speech_search import speech_search_text

    output = Output(as_json=as_json)
    if recipe.suffix != ".json":
        raise OmniFP4Error(f"{recipe}: a recipe's name ends in .json", hint="--recipe of quantize takes no other file")
    if recipe.exists():
        raise OutputError(f"{recipe} exists", hint="choose another name, or remove it")
    check_receipt(recipe)
    check_receipt(receipt)
    if receipt is not None and receipt.resolve() == recipe.resolve():
        raise OutputError(f"--receipt is {receipt}, the recipe's own file", hint="choose another name")
    hush_libraries()
    with output.steps("speech-recipe") as steps:
        found = search(
            model, data=data, samples=samples, base=base, schemes=[name.strip() for name in schemes.split(",")],
            times_floor=times_floor, name=recipe.stem, device=device, cache=cache, seed=seed, progress=steps,
        )  # fmt: skip
    path = recipe
    try:
        write_text(path, json.dumps(found.recipe, indent=2) + "\n")
        if receipt is not None:
            path = receipt
            write_text(path, found.model_dump_json(indent=2) + "\n")
    except OSError as error:
        output.result(found, speech_search_text(found))  # hours of work; with --json the recipe is in it
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    output.result(found, speech_search_text(found))
    output.say(f"next: omnifp4 quantize {shlex.quote(model)} OUT --recipe {shlex.quote(str(recipe))}")
