"""What each way to NVFP4 costs the bundled tiny model, in every modality, and the pictures of the README.

Five artifacts are made of the same checkpoint: the default recipe with each scale rule, the experts alone (nvfp4-mlp),
and thinker with talker (nvfp4-thinker-talker). Each is proven and evaluated on all bundled samples; the default one
gets its sensitivity map too. Receipts, report and pictures are made of these runs alone.

    python benchmarks/recipe_costs.py [--folder DIR] [--samples N] [--pictures DIR]

Writes DIR/*.json, DIR/report.html (the default recipe), DIR/recipes.html (all five) and the pictures; prints the table
of costs in Markdown. On two cores without a GPU it takes some minutes; what was run before is taken from DIR/cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import omnifp4
from omnifp4.receipt.base import Record
from omnifp4.receipt.evaluation import EvaluationReceipt
from omnifp4.report.figures import figure
from omnifp4.tiny import write_tiny_omni

DEFAULT = "nvfp4-sweep"
WAYS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "nvfp4-four-over-six": {"rule": "four-over-six"},
    "nvfp4-max": {"rule": "max"},
    "nvfp4-mlp": {"recipe": "nvfp4-mlp"},
    "nvfp4-thinker-talker": {"recipe": "nvfp4-thinker-talker"},
}
"""Arguments of quantize by folder name, which is what the report calls it."""


def table(found: dict[str, EvaluationReceipt]) -> str:
    """Costs in Markdown: rows are ways, columns are modalities and tasks."""
    first = found[DEFAULT]
    modalities = [item.modality for item in first.modalities]
    tasks = [item.task for item in first.tasks]
    lines = [
        f"| recipe | {' | '.join(f'KL {name}' for name in modalities)} | {' | '.join(tasks)} | speech codes equal | "
        "spoken digit understood |",
        f"|---|{'---|' * (len(modalities) + len(tasks) + 2)}",
    ]
    floors = [figure(item.floor.kl_mean.value) if item.floor else "" for item in first.modalities]
    right = [f"{100 * item.reference:.1f} %" for item in first.tasks]
    heard = first.speech.recognition if first.speech else None
    lines.append(
        f"| BF16 (KL: noise floor) | {' | '.join(floors)} | {' | '.join(right)} | | "
        f"{f'{100 * heard.reference:.1f} %' if heard else ''} |"
    )
    for name, receipt in found.items():
        kl = [figure(item.model.kl_mean.value) for item in receipt.modalities]
        points = [f"{100 * item.difference.value:+.1f}" for item in receipt.tasks]
        speech = receipt.speech
        codes = f"{100 * speech.code_agreement.value:.1f} %" if speech else ""
        spoken = f"{100 * speech.recognition.difference.value:+.1f}" if speech and speech.recognition else ""
        lines.append(f"| {name} | {' | '.join(kl)} | {' | '.join(points)} | {codes} | {spoken} |")
    lines.append("")
    lines.append(
        f"{first.samples} samples, {first.dtype} on {first.device}. KL: mean divergence from BF16 in nats a token. Tasks: "
        "share answered rightly by BF16, then the change in points."
    )
    return "\n".join(lines)


def told(title: str) -> Callable[[int, int, str], None]:
    """Progress on one line of standard error."""

    def show(done: int, total: int, item: str) -> None:
        sys.stderr.write(f"\r{title}: {done / max(total, 1):4.0%} {item[:50]:<50}")

    return show


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, default=None)
    arguments.add_argument("--samples", type=int, default=None)
    arguments.add_argument("--pictures", type=Path, default=None)
    chosen = arguments.parse_args()
    folder: Path = chosen.folder or Path(tempfile.mkdtemp(prefix="omnifp4-recipes-"))
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "tiny-omni"
    if not source.exists():
        write_tiny_omni(source)
    found: dict[str, EvaluationReceipt] = {}
    for name, options in WAYS.items():
        artifact = folder / name
        if not artifact.exists():
            omnifp4.quantize(source, artifact, **options)
        found[name] = omnifp4.evaluate(
            artifact, against=source, samples=chosen.samples, cache=folder / "cache", progress=told(name)
        )
        (folder / f"{name}.json").write_text(found[name].model_dump_json(indent=2) + "\n", encoding="utf-8")
        sys.stderr.write("\n")
    places = omnifp4.sensitivity(
        folder / DEFAULT, against=source, samples=chosen.samples or 8, cache=folder / "cache", progress=told("map")
    )
    sys.stderr.write("\n")
    (folder / "sensitivity.json").write_text(places.model_dump_json(indent=2) + "\n", encoding="utf-8")
    proof = omnifp4.verify(folder / DEFAULT, against=source)
    one: list[Path | Record] = [omnifp4.plan(source), proof, folder / DEFAULT, found[DEFAULT], places]
    omnifp4.write_report(one, folder / "report.html", pictures=chosen.pictures or folder / "pictures")
    omnifp4.write_report(found.values(), folder / "recipes.html", pictures=folder / "pictures-of-recipes")
    if chosen.pictures:
        costs = folder / "pictures-of-recipes" / "quality.svg"
        (chosen.pictures / "recipes.svg").write_text(costs.read_text(encoding="utf-8"), encoding="utf-8")
    print(table(found))
    print(f"\n{folder / 'report.html'}\n{folder / 'recipes.html'}")


if __name__ == "__main__":
    main()
