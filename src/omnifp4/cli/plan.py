"""omnifp4 plan"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output


def plan(
    model: options.Model,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Where it would be written, for the free disk space.")
    ] = None,
    recipe: options.RecipeName = "nvfp4",
    output_format: options.Format = "modelopt",
    rule: options.Rule = None,
    component: options.Components = None,
    effective_bits: options.EffectiveBits = None,
    count_bits: options.Counted = None,
    choose_by: options.ChooseBy = None,
    sensitivity: options.SensitivityMap = None,
    statistics: options.StatisticsFile = None,
    max_shard_size: options.ShardSize = "5GB",
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Say what quantize would do: bytes per component before and after, what stays wide and why. Reads headers only."""
    from omnifp4.api import plan as make_plan
    from omnifp4.report.terminal import plan_text

    output = Output(as_json=as_json)
    receipt = make_plan(
        model,
        out=out or Path(),
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
        revision=revision,
    )
    output.result(receipt, plan_text(receipt))
