"""Arguments that several verbs share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final

import typer

from omnifp4.errors import OmniFP4Error

SIZE_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A checkpoint folder, or a Hub id such as Qwen/Qwen3-Omni-30B-A3B-Instruct."),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to be made; must not exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="nvfp4, nvfp4-mlp, nvfp4-thinker-talker, nvfp4-speech; those that look at inputs: nvfp4-w4a4, -importance, -local-hessian, "
        "-gptq, -awq-lite, -awq-full, -svdquant, -signround, -auto; or a .json file of your own.",
    ),
]
Rule = Annotated[
    str | None,
    typer.Option(
        "--rule",
        help="Scale rule: sweep (default), four-over-six or max; with statistics also importance or local-hessian.",
    ),
]
StatisticsFile = Annotated[
    Path | None,
    typer.Option("--statistics", metavar="FILE", help="What calibrate wrote, for a recipe that looks at inputs."),
]
EffectiveBits = Annotated[
    float | None, typer.Option("--effective-bits", help="Budget of nvfp4-auto in bits a weight; 4.8 if not given.")
]
Counted = Annotated[
    str | None,
    typer.Option(
        "--count-bits", metavar="stored|read", help="Budget of nvfp4-auto counts weights once, or as tokens read them."
    ),
]
ChooseBy = Annotated[
    str | None,
    typer.Option(
        "--choose-by",
        metavar="output|gradient|kl",
        help="What nvfp4-auto takes a format to cost: the lost share of outputs, squared gradients (calibrate --gradients), "
        "or the divergence in a sensitivity map.",
    ),
]
SensitivityMap = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        metavar="FILE",
        help="What evaluate --sensitivity --receipt wrote of a plain nvfp4 artifact: nvfp4-auto then chooses by kl.",
    ),
]
Components = Annotated[
    list[str] | None,
    typer.Option(
        "--component",
        metavar="NAME=SCHEME",
        help="Set one component to nvfp4, mxfp4, fp8, int8 or bf16; repeat for more. plan lists the names.",
    ),
]
Format = Annotated[str, typer.Option("--format", help="modelopt, compressed-tensors or fake-quant.")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest shard file, such as 5GB or 500MB.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Worker threads; one per core if not given.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run left in OUT.partial.")]


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB``, ``4GiB`` or a plain number."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = SIZE_UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or not 1 <= float(match.group(1)) * unit < 2**63:
        raise OmniFP4Error(f"size {text[:40]!r} is not a number with one of {', '.join(filter(None, SIZE_UNITS))}")
    return int(float(match.group(1)) * unit)
