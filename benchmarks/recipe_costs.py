"""What each way to NVFP4 costs the bundled tiny model, in every modality: the table and the pictures of the README.

Five artifacts are made of the same checkpoint: the default recipe with each scale rule, the experts alone (nvfp4-mlp),
and thinker with talker (nvfp4-thinker-talker). Each is proven and evaluated on the same samples; the default one gets
its sensitivity map too. Receipts, page, reports and pictures are made of these runs alone.

    python benchmarks/recipe_costs.py [--calibrated] [--model FOLDER] [--data FILE] [--samples N] [--folder DIR] [--docs docs]

With --calibrated the recipes that look at inputs are set beside the default one instead, calibrated on the bundled
calibration set, which shares no sample with the evaluation's. Writes DIR/*.json, DIR/report.html (the default recipe) and DIR/recipes.html (all five), and with --docs the page
costs.md (costs-calibrated.md) and its pictures in images/. Exit status 1 if the default recipe loses more than a point in a task. What was
run before is taken from DIR/cache; on two cores without a GPU it takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import omnifp4
from omnifp4.receipt.base import Record, Verdict
from omnifp4.receipt.evaluation import EvaluationReceipt, TaskResult
from omnifp4.receipt.quantization import QuantizationReceipt
from omnifp4.receipt.verification import VerificationReceipt
from omnifp4.report.figures import figure, size_text
from omnifp4.tiny import write_tiny_omni

DEFAULT = "sweep"
WAYS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "four-over-six": {"rule": "four-over-six"},
    "max": {"rule": "max"},
    "mlp-only": {"recipe": "nvfp4-mlp"},
    "thinker-talker": {"recipe": "nvfp4-thinker-talker"},
}
"""Arguments of quantize by folder name, which is what reports call it."""
CALIBRATED: dict[str, dict[str, Any]] = {DEFAULT: {}} | {
    name: {"recipe": f"nvfp4-{name}", "data": "bundled"}
    for name in ("importance", "local-hessian", "gptq", "awq-lite", "awq-full", "svdquant", "signround")
}
"""The recipes that look at inputs, beside the default one."""
MAP_SAMPLES = 4
"""Of each task, for the map: it runs the model some forty times."""
MOST_LOST = 0.01
"""Share of right answers that the default recipe may lose in any task."""
PICTURES = {"quality.svg": "costs-divergence.svg", "quality-2.svg": "costs-answers.svg"}
CALIBRATED_PICTURES = {"quality.svg": "calibrated-divergence.svg", "quality-2.svg": "calibrated-answers.svg"}
MAP_PICTURES = {"sensitivity.svg": "sensitivity.svg", "sensitivity-2.svg": "sensitivity-layers.svg"}


@dataclass(frozen=True)
class Way:
    """One artifact and what was found."""

    made: QuantizationReceipt
    proof: VerificationReceipt
    cost: EvaluationReceipt


def table(found: dict[str, Way]) -> Iterator[str]:
    """Lines of Markdown: a row for each figure, a column for each way."""
    first = found[DEFAULT]
    costs = [way.cost for way in found.values()]
    yield f"| | BF16 | {' | '.join(found)} |"
    yield f"|---|{'---:|' * (len(found) + 1)}"
    sizes = [size_text(way.made.weight_bytes) for way in found.values()]
    yield _row("weights on disk", size_text(first.made.source.weight_bytes), sizes)
    errors = [figure(way.made.relative_squared_error) for way in found.values()]
    yield _row("relative squared error of the weights", "", errors)
    for place, item in enumerate(first.cost.modalities):
        floor = f"floor {figure(item.floor.kl_mean.value)}" if item.floor else ""
        kl = [figure(cost.modalities[place].model.kl_mean.value) for cost in costs]
        yield _row(f"KL, {item.modality}", floor, kl)
        same = [f"{100 * cost.modalities[place].model.top1_agreement.value:.1f} %" for cost in costs]
        noise = f"floor {100 * item.floor.top1_agreement.value:.1f} %" if item.floor else ""
        yield _row(f"same likeliest token, {item.modality}", noise, same)
        if item.modality == "text":
            ratios = [f"{cost.modalities[place].model.perplexity_ratio.value:.3f}" for cost in costs]
            yield _row("perplexity over BF16's, text", f"{item.reference_perplexity:.1f}", ratios)
    for place, task in enumerate(first.cost.tasks):
        points = [_points(cost.tasks[place]) for cost in costs]
        yield _row(f"{task.task} ({task.samples})", f"{100 * task.reference:.1f} %", points)
    spoken = [cost.speech for cost in costs if cost.speech is not None]
    if len(spoken) == len(costs):
        noise = f"floor {100 * spoken[0].floor.code_agreement.value:.1f} %" if spoken[0].floor else ""
        yield _row("speech codes equal", noise, [f"{100 * one.code_agreement.value:.1f} %" for one in spoken])
        heard = [one.recognition for one in spoken if one.recognition is not None]
        if len(heard) == len(costs):
            before = f"{100 * heard[0].reference:.1f} %"
            told = f"spoken answer understood ({heard[0].utterances})"
            yield _row(told, before, [f"{100 * one.difference.value:+.1f}" for one in heard])


def _row(name: str, before: str, after: list[str]) -> str:
    return f"| {name} | {before} | {' | '.join(after)} |"


def _points(task: TaskResult) -> str:
    """Change in points, with the samples that were lost and gained."""
    return f"{100 * task.difference.value:+.1f} ({task.lost}/{task.gained})" if task.lost or task.gained else "0"


def page(found: dict[str, Way], command: str, *, calibrated: bool = False) -> str:
    """The whole page in Markdown."""
    cost = found[DEFAULT].cost
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {cost.device}, torch {metadata.version('torch')}"
    columns = (
        "the default recipe (sweep), which needs no data, and the recipes that look at inputs, calibrated on the bundled "
        "calibration set, which shares no sample with these"
        if calibrated
        else "the default recipe with each scale rule (sweep is the default), `nvfp4-mlp`, and `nvfp4-thinker-talker`"
    )
    pictures = CALIBRATED_PICTURES if calibrated else PICTURES
    lines = [
        "# What calibrated recipes cost" if calibrated else "# What NVFP4 costs",
        "",
        f"Written by `{command}` on {cost.environment.made_at[:10]}; {machine}, transformers "
        f"{metadata.version('transformers')}, omnifp4 {cost.environment.omnifp4}. {cost.samples} samples "
        f"({Path(cost.data).name}, SHA-256 {cost.data_sha256[:12]}), {cost.dtype}.",
        "",
        f"Each column is one artifact of the bundled tiny model: {columns}. KL is the mean divergence of next-token "
        "distributions from BF16 "
        "in nats, by what is in the input; its floor is BF16 against itself with another order of rounding. Tasks: the share "
        "answered exactly by BF16, then the change in points (samples lost/gained); 0 is no sample changed. The picture has "
        "the 95 % intervals. Speech codes: share of the codes of BF16's speech that are the same, each side running on by "
        "itself: one that differs changes all that follow, also in the floor.",
        "",
        *table(found),
        "",
        verdict(found),
        "",
        f"![KL divergence by modality](images/{pictures['quality.svg']})",
        "",
        f"![Right answers against BF16](images/{pictures['quality-2.svg']})",
        "",
    ]
    if not calibrated:
        lines += [
            "Where in the model the default recipe does harm, each component and each layer in FP4 alone:",
            "",
            "![KL divergence of each component alone](images/sensitivity.svg)",
            "",
            "![KL divergence of each layer alone](images/sensitivity-layers.svg)",
            "",
        ]
    return "\n".join(lines)


def verdict(found: dict[str, Way]) -> str:
    """Whether the default recipe keeps what is asked of it."""
    gate = next(gate for gate in found[DEFAULT].cost.gates if gate.option == "--max-accuracy-loss")
    worst = f"{100 * gate.value:.1f} points ({gate.where})" if gate.value > 0 else "none"
    return f"The most that the default recipe loses in any task: {worst}; limit {100 * MOST_LOST:g} point: {gate.verdict.value}."


def told(title: str) -> Callable[[int, int, str], None]:
    """Progress on one line of standard error."""

    def show(done: int, total: int, item: str) -> None:
        sys.stderr.write(f"\r{title}: {done / max(total, 1):4.0%} {item[:50]:<50}")

    return show


def run(
    source: Path, folder: Path, data: str, samples: int | None, ways: dict[str, dict[str, Any]]
) -> tuple[dict[str, Way], list[Record]]:
    """Everything that is measured; the second part is the rest of the default recipe's report."""
    found: dict[str, Way] = {}
    for name, options in ways.items():
        artifact = folder / name
        if not artifact.exists():
            omnifp4.quantize(source, artifact, **options)
        cost = omnifp4.evaluate(
            artifact, against=source, data=data, samples=samples, cache=folder / "cache", progress=told(name),
            max_accuracy_loss=MOST_LOST if name == DEFAULT else None,
        )  # fmt: skip
        sys.stderr.write("\n")
        made = QuantizationReceipt.model_validate_json((artifact / "omnifp4.json").read_text("utf-8"))
        found[name] = Way(made, omnifp4.verify(artifact, against=source), cost)
        (folder / f"{name}.json").write_text(cost.model_dump_json(indent=2) + "\n", encoding="utf-8")
    rest: list[Record] = [omnifp4.plan(source), found[DEFAULT].proof, found[DEFAULT].cost]
    if ways is CALIBRATED:
        return found, rest
    # In float32: the noise of BF16 rounding is above what most layers cost alone.
    places = omnifp4.sensitivity(
        folder / DEFAULT, against=source, data=data, samples=MAP_SAMPLES, experts=True, dtype="float32",
        cache=folder / "cache", progress=told("map"),
    )  # fmt: skip
    sys.stderr.write("\n")
    (folder / "sensitivity.json").write_text(places.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return found, [*rest, places]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--calibrated", action="store_true", help="compare the recipes that look at inputs")
    arguments.add_argument("--model", type=Path, help="a wide checkpoint; the bundled tiny model if not given")
    arguments.add_argument("--data", default="bundled", help="JSONL of samples")
    arguments.add_argument("--samples", type=int, help="only so many of each task")
    arguments.add_argument("--folder", type=Path, help="for artifacts and receipts; a new temporary one if not given")
    arguments.add_argument("--docs", type=Path, help="folder to write costs.md and images/ to")
    chosen = arguments.parse_args()
    folder: Path = chosen.folder or Path(tempfile.mkdtemp(prefix="omnifp4-recipes-"))
    folder.mkdir(parents=True, exist_ok=True)
    source: Path = chosen.model or folder / "tiny-omni"
    if not source.exists():
        write_tiny_omni(source)
    found, rest = run(source, folder, chosen.data, chosen.samples, CALIBRATED if chosen.calibrated else WAYS)
    if len({way.cost.data_sha256 for way in found.values()}) > 1:
        sys.exit(f"{chosen.data}: changed while it was used; run again")
    for name, way in found.items():
        if way.proof.verdict is not Verdict.PASS:
            sys.exit(f"{folder / name}: verify says {way.proof.verdict.value}")
    omnifp4.write_report([folder / DEFAULT, *rest], folder / "report.html", pictures=folder / "pictures")
    costs = [way.cost for way in found.values()]
    omnifp4.write_report(costs, folder / "recipes.html", pictures=folder / "recipes")
    command = " ".join(["python", "benchmarks/recipe_costs.py", *sys.argv[1:]])
    text = page(found, command, calibrated=chosen.calibrated)
    if chosen.docs:
        images = chosen.docs / "images"
        images.mkdir(parents=True, exist_ok=True)
        drawn = [(folder / "recipes", CALIBRATED_PICTURES if chosen.calibrated else PICTURES)]
        if not chosen.calibrated:
            drawn.append((folder / "pictures", MAP_PICTURES))
        for pictures, names in drawn:
            for before, after in names.items():
                (images / after).write_text((pictures / before).read_text("utf-8"), encoding="utf-8")
        (chosen.docs / ("costs-calibrated.md" if chosen.calibrated else "costs.md")).write_text(text, encoding="utf-8")
    print(text)
    print(f"{folder / 'report.html'}\n{folder / 'recipes.html'}")
    if found[DEFAULT].cost.verdict is not Verdict.PASS:
        sys.exit(1)


if __name__ == "__main__":
    main()
