"""omnifp4 demo"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.rule import Rule
from rich.text import Text

from omnifp4.cli.output import Output


def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Where to put the demo; a new temporary folder if not given."),
    ] = None,
) -> None:
    """Show the whole path on the bundled tiny omni model, offline: make it, plan, quantize, verify."""
    from omnifp4 import api
    from omnifp4.receipt.base import Verdict
    from omnifp4.report.terminal import plan_text, quantization_text, size_text, verification_text
    from omnifp4.tiny import write_tiny_omni

    output = Output(as_json=False)
    home = folder or Path(tempfile.mkdtemp(prefix="omnifp4-demo-"))
    source, artifact = home / "tiny-omni", home / "tiny-omni-nvfp4"

    output.show(Rule("a small checkpoint of the real architecture", align="left"))
    write_tiny_omni(source)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    output.show(Text(f"{source}: thinker with experts, towers, talker, code predictor, code2wav; {size_text(weights)}"))

    output.show(Rule("omnifp4 plan: what would happen, from headers alone", align="left"))
    plan = api.plan(source, out=artifact)
    output.show(plan_text(plan))

    output.show(Rule("omnifp4 quantize: stream it to NVFP4", align="left"))
    with output.progress("quantize") as progress:
        receipt = api.quantize(source, artifact, progress=progress)
    output.show(quantization_text(receipt, str(artifact)))
    written = sum((artifact / shard).stat().st_size for shard in receipt.shards)
    output.show(Text(f"planned {plan.weight_bytes_after:,} bytes of weights, wrote {written:,}"))

    output.show(Rule("omnifp4 verify --against: the proof, from the files alone", align="left"))
    proof = api.verify(artifact, against=source)
    output.show(verification_text(proof))

    output.show(Rule("what you have", align="left"))
    for path in sorted(artifact.rglob("*")):
        if path.is_file():
            output.show(Text(f"{size_text(path.stat().st_size):>9}  {path.relative_to(home)}"))
    output.show(
        Text(
            "\nnext, with a real model:\n  omnifp4 plan Qwen/Qwen3-Omni-30B-A3B-Instruct\n"
            "  omnifp4 quantize Qwen/Qwen3-Omni-30B-A3B-Instruct OUT\n  omnifp4 verify OUT --against MODEL_FOLDER"
        )
    )
    if proof.verdict is not Verdict.PASS or written != plan.weight_bytes_after:
        raise typer.Exit(1)
