"""What each scheme does to the speech of the bundled tiny model, component by component, and the recipe that follows.

The search of ``omnifp4 speech-recipe`` is run with the schemes that both dialects hold (nvfp4, fp8), whose outcome is the
recipe; with --all-schemes once more with those that fewer engines read (mxfp4, int8), for the table. The answers that are spoken: those of
the bundled samples that are spoken in every evaluation, and of its tasks in text every so many, so that there are more and
longer ones.

    python benchmarks/speech_recipes.py [--model FOLDER] [--every N] [--all-schemes] [--folder DIR] [--docs docs]

Then artifacts of the bundled recipes are made and evaluated on the same answers, packed as they are.

Writes DIR/speech*.json and, with --docs, the page costs-speech.md. A search whose record is in DIR already is not run again,
and one that was interrupted goes on from DIR/cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import omnifp4
from omnifp4.evaluation import SpeechSearchSettings, search_speech
from omnifp4.formats.scheme import Scheme
from omnifp4.receipt.evaluation import SpeechFloor, SpeechResult
from omnifp4.receipt.speech_search import SpeechSearchReceipt, SpeechTrial
from omnifp4.report.figures import figure, size_text
from omnifp4.tiny import write_tiny_omni

SEARCHES = {"speech": (Scheme.NVFP4, Scheme.FP8), "speech-others": (Scheme.MXFP4, Scheme.INT8)}
"""Schemes by name of the record."""
RECIPES = ("nvfp4", "nvfp4-speech", "nvfp4-thinker-talker")
NOTHING = 1e-12
"""Nats that the rounding of what is kept of the reference makes of none."""
SPOKEN_TASKS = ("repeat", "arithmetic")
"""In text, with digits for answers: the bundled talker learned to speak nothing else."""


def spoken_data(path: Path, every: int) -> None:
    """Write the samples whose answers are spoken, with media by absolute paths."""
    home = Path(str(files("omnifp4.evaluation").joinpath("samples")))
    kept, seen = [], dict.fromkeys(SPOKEN_TASKS, 0)
    for line in (home / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        task = sample.get("task", "")
        if task in seen and not sample.get("speak"):
            seen[task] += 1
            if seen[task] % every:
                continue
            sample["speak"] = True
        if sample.get("speak"):
            for part in sample["messages"][0]["content"]:
                if (kind := part["type"]) != "text":
                    part[kind] = str(home / part[kind])
            kept.append(json.dumps(sample))
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")


def artifacts(model: Path, data: Path, folder: Path, show: Any) -> Iterator[str]:
    """Lines of Markdown: what whole artifacts of the bundled recipes do to the same speech."""
    yield "| recipe | weights | KL, first codes | KL, later codes | KL, last quarter | codes equal | digits |"
    yield "|---|---|---|---|---|---|---|"
    for recipe in RECIPES:
        artifact = folder / recipe
        if not artifact.exists():
            omnifp4.quantize(model, artifact, recipe=recipe)
        cost = omnifp4.evaluate(artifact, against=model, data=data, floor=False, cache=folder / "cache", progress=show)
        assert cost.speech is not None
        plan = omnifp4.plan(model, recipe=recipe)
        cells = _speech_cells(cost.speech)
        yield f"| `{recipe}` | {size_text(plan.weight_bytes_after)} | {' | '.join(cells)} |"


def table(found: SpeechSearchReceipt, others: SpeechSearchReceipt | None) -> Iterator[str]:
    """Lines of Markdown: a row for each trial."""
    yield "| rounded | scheme | weights | KL, first codes | KL, later codes | KL, last quarter | codes equal | digits | borne |"
    yield "|---|---|---|---|---|---|---|---|---|"
    yield _row("nothing, another attention (the floor)", "bf16", "", found.floor, "")
    yield _trial_row(found.base_alone, found.base)
    names = list(dict.fromkeys(trial.name for trial in found.trials))
    for name in names:
        for trial in (*found.trials, *(others.trials if others is not None else ())):
            if trial.name == name:
                yield _trial_row(trial, next(iter(trial.schemes.values())))
    for trial in found.together:
        yield _trial_row(trial, ", ".join(f"{name} {scheme}" for name, scheme in trial.schemes.items()))
    if found.with_base is not None:
        yield _trial_row(found.with_base, "")


def _trial_row(trial: SpeechTrial, scheme: str) -> str:
    weights = f"{size_text(trial.bytes_before)} to {size_text(trial.bytes_after)}"
    return _row(trial.name, scheme, weights, trial.speech, "no" if trial.exceeds else "yes")


def _row(name: str, scheme: str, weights: str, speech: SpeechFloor, borne: str) -> str:
    return f"| {' | '.join([name, scheme, weights, *_speech_cells(speech), borne])} |"


def _speech_cells(speech: SpeechFloor | SpeechResult) -> list[str]:
    later, last = speech.later_code_kl_mean, speech.drift[-1] if speech.drift else None
    heard = speech.recognition
    return [
        _estimate(speech.code_kl_mean),
        _estimate(later),
        _estimate(last),
        f"{100 * speech.code_agreement.value:.0f} % ({100 * speech.code_agreement.low:.0f} … {100 * speech.code_agreement.high:.0f})",
        "" if heard is None else f"{round(heard.model * heard.utterances)} of {heard.utterances}",
    ]


def _estimate(value: Any) -> str:
    if value is None:
        return ""
    return "0" if value.high < NOTHING else f"{figure(value.value)} ({figure(value.low)} … {figure(value.high)})"


def page(found: SpeechSearchReceipt, others: SpeechSearchReceipt | None, whole: Iterator[str], command: str) -> str:
    """The whole page in Markdown."""
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {found.device}, torch {metadata.version('torch')}"
    borne = ", ".join(f"{name} in {scheme}" for name, scheme in found.chosen.items()) or "nothing"
    return "\n".join(
        [
            "# What each scheme costs speech",
            "",
            f"Written by `{command}` on {found.environment.made_at[:10]}; {machine}, transformers "
            f"{metadata.version('transformers')}, omnifp4 {found.environment.omnifp4}. {found.utterances} spoken answers "
            f"({found.long_utterances} of them long), {found.frames:,} frames, data SHA-256 {found.data_sha256[:12]}; "
            f"borne is up to {found.times_floor:g} times the floor.",
            "",
            "The components of the bundled model's talker, and its code predictor, each rounded alone and the rest left in "
            "BF16. KL: of the next code's distribution from BF16's in nats, all codes before it given (95 % intervals); a "
            "frame's first code is the talker's, the later ones are the code predictor's. Last quarter: of the first codes of "
            "long answers. Codes equal: each side running on by itself, greedy; one that differs changes all that follow, as "
            "the floor shows. Digits: spoken digits that a classifier of real recordings hears.",
            "",
            *table(found, others),
            "",
            f"Chosen: {borne}.",
            "",
            "Whole artifacts of the bundled recipes, packed, on the same answers:",
            "",
            *whole,
            "",
        ]
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, help="a wide checkpoint; the bundled tiny model if not given")
    arguments.add_argument("--every", type=int, default=5, help="speak every so many answers of the tasks in text")
    arguments.add_argument("--all-schemes", action="store_true", help="try mxfp4 and int8 too")
    arguments.add_argument("--folder", type=Path, help="for records; a new temporary one if not given")
    arguments.add_argument("--docs", type=Path, help="folder to write costs-speech.md to")
    chosen = arguments.parse_args()
    folder: Path = chosen.folder or Path(tempfile.mkdtemp(prefix="omnifp4-speech-"))
    folder.mkdir(parents=True, exist_ok=True)
    model: Path = chosen.model or folder / "tiny-omni"
    if not model.exists():
        write_tiny_omni(model)
    data = folder / "spoken.jsonl"
    spoken_data(data, chosen.every)

    def show(done: int, total: int, item: str) -> None:
        sys.stderr.write(f"\r{done / max(total, 1):4.0%} {item[:70]:<70}")

    found = {}
    for name, schemes in SEARCHES.items() if chosen.all_schemes else [*SEARCHES.items()][:1]:
        record = folder / f"{name}.json"
        if record.exists():
            found[name] = SpeechSearchReceipt.model_validate_json(record.read_text("utf-8"))
            continue
        settings = SpeechSearchSettings(data=data, schemes=schemes, cache=folder / "cache", name=f"own-{name}")
        found[name] = search_speech(model, settings, show)
        sys.stderr.write("\n")
        record.write_text(found[name].model_dump_json(indent=2) + "\n", encoding="utf-8")
    command = " ".join(["python", "benchmarks/speech_recipes.py", *sys.argv[1:]])
    text = page(found["speech"], found.get("speech-others"), artifacts(model, data, folder, show), command)
    if chosen.docs:
        (chosen.docs / "costs-speech.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
