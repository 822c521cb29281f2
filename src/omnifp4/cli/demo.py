"""omnifp4 demo"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.rule import Rule
from rich.text import Text

from omnifp4.cli.output import Output
from omnifp4.receipt.base import Record

NEEDED: Final = ("torch", "torchvision", "transformers", "soundfile", "PIL")
"""Packages that running a model needs; planning, quantizing and proving need none of them."""
SAMPLES: Final = 4
"""Of each task: what keeps the whole demo under two minutes on two cores."""
MAP_SAMPLES: Final = 1
"""For the map, which runs the model some forty times."""
ASKED: Final = ("picture digit", "spoken digit", "add two", "compare two", "repeat")
"""Tasks of the bundled samples of which the first one with the most modalities is asked aloud in the demo."""
SPOKEN: Final = "picture digit"
"""The one whose answer is spoken to a file."""
MOST_SPEECH_SECONDS: Final = 4.0


def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Where to put the demo; a new temporary folder if not given."),
    ] = None,
) -> None:
    """Show the whole path on the bundled tiny omni model, offline: plan, quantize, verify, evaluate, talk, bench, report."""
    from omnifp4 import api
    from omnifp4.doctor import run_doctor
    from omnifp4.receipt.base import Verdict
    from omnifp4.report.figures import size_text
    from omnifp4.report.summary import key_figures_text
    from omnifp4.report.terminal import plan_text, quantization_text, verification_text
    from omnifp4.report.writing import write_report
    from omnifp4.tiny import write_tiny_omni

    output = Output(as_json=False)
    home = folder or Path(tempfile.mkdtemp(prefix="omnifp4-demo-"))
    source, artifact, page = home / "tiny-omni", home / "tiny-omni-nvfp4", home / "report.html"

    output.show(Rule("a small trained model of the real architecture", align="left"))
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

    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        output.show(Text(f"\nnot evaluated: {', '.join(lacking)} is not here (pip install 'omnifp4[run]')"))
    measured = [] if lacking else _measure(output, source, artifact, home / "cache")

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

    output.show(Rule("omnifp4 report: everything on one page, and in the model card", align="left"))
    records = [plan, proof, *measured, run_doctor(str(artifact))]
    gathered = write_report(records, [page, home / "report.json"], card=artifact)
    output.show(key_figures_text(gathered))
    output.show(Text(f"\n{page}"))
    broken = any(getattr(record, "verdict", None) is Verdict.FAIL for record in measured)
    broken |= any(not getattr(record, "passed", True) for record in measured)
    if broken or proof.verdict is not Verdict.PASS or written != plan.weight_bytes_after:
        raise typer.Exit(1)


def _measure(output: Output, source: Path, artifact: Path, cache: Path) -> list[Record]:
    """What runs the model: what FP4 costs, a talk, where it costs, and how fast it is here."""
    import torch

    from omnifp4 import api
    from omnifp4.checkpoint.folder import read_json
    from omnifp4.cli.talk import hush_libraries
    from omnifp4.evaluation.threads import suited_threads
    from omnifp4.report.bench_card import bench_text
    from omnifp4.report.evaluation import evaluation_text
    from omnifp4.report.sensitivity import sensitivity_text

    hush_libraries()
    width = int(read_json(source / "config.json")["thinker_config"]["text_config"]["hidden_size"])
    output.show(Rule("omnifp4 evaluate --against: what it costs in answers", align="left"))
    with output.steps("evaluate") as steps:
        cost = api.evaluate(artifact, against=source, samples=SAMPLES, device="cpu", cache=cache, progress=steps)
    output.show(evaluation_text(cost))

    output.show(Rule("omnifp4 chat: talk with it", align="left"))
    with suited_threads(width, torch.device("cpu")):
        _talk(output, artifact, artifact.parent / "answer.wav")

    output.show(Rule("omnifp4 evaluate --sensitivity --each-expert: where it hurts", align="left"))
    with output.steps("sensitivity") as steps:
        # In float32 the noise of rounding is far below what a single expert costs.
        places = api.sensitivity(
            artifact, against=source, samples=MAP_SAMPLES, experts=True, device="cpu", dtype="float32", cache=cache,
            progress=steps,
        )  # fmt: skip
    output.show(sensitivity_text(places))

    output.show(Rule("omnifp4 bench --quick: how fast it is here, on one core", align="left"))
    with suited_threads(width, torch.device("cpu")):
        speed = api.bench(
            artifact, against=source, prefill=(64,), batch=(1,), context=(64,), new_tokens=16, cell_seconds=2.0,
            device="cpu", quick=True,
        )  # fmt: skip
    output.show(bench_text(speed))
    return [cost, places, speed]


def _talk(output: Output, artifact: Path, wav: Path) -> None:
    """One question of each kind, from samples that the model has never seen."""
    from omnifp4.chat import OmniChat
    from omnifp4.chat.wav import WavWriter
    from omnifp4.evaluation.data import BUNDLED, MIXED, read_data
    from omnifp4.evaluation.listening import load_listener

    chat = OmniChat(str(artifact), device="cpu", temperature=0.0, max_new_tokens=16)
    samples = read_data(BUNDLED)
    for task in ASKED:
        sample = max((one for one in samples if one.task == task), key=lambda one: one.modality == MIXED)
        answer = chat.complete(
            list(sample.messages), speak=task == SPOKEN, speech_temperature=0.0, max_speech_seconds=MOST_SPEECH_SECONDS
        )
        parts = sample.messages[-1]["content"]
        asked = " ".join(part["text"] if part["type"] == "text" else _named(part) for part in parts)
        verdict = "right" if answer.text.strip() == sample.answer else f"the answer is {sample.answer}"
        output.show(
            Text.assemble("you    ", (asked, "bold"), f"\nmodel  {answer.text.strip()}  ", (f"({verdict})", "dim"))
        )
        if answer.waveform is not None:
            with WavWriter(wav) as file:
                file.write(answer.waveform)
            heard = load_listener()(answer.waveform)
            output.show(Text(f"       spoken: {len(answer.waveform) / answer.sampling_rate:.1f} s in {wav}"))
            output.show(Text(f"       a classifier that knows real recordings only hears: {heard}"))


def _named(part: dict[str, Any]) -> str:
    """A picture or a recording by its file's name."""
    return f"[{Path(part[part['type']]).name}]"
