"""What each scheme does to the speech of the bundled tiny model, component by component, and the recipe that follows.

The search of ``omnifp4 speech-recipe`` is run twice: with the schemes that both dialects hold (nvfp4, fp8), whose outcome
is the recipe; and with those that fewer engines read (mxfp4, int8), for the table. The answers that are spoken: those of
the bundled samples that are spoken in every evaluation, and of its tasks in text every so many, so that there are more and
longer ones.

    python benchmarks/speech_recipes.py [--model FOLDER] [--every N] [--folder DIR] [--docs FILE]

Writes DIR/speech-*.json and, with --docs, the tables in Markdown. What was run before is taken from DIR/cache.
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

from omnifp4.evaluation import SpeechSearchSettings, search_speech
from omnifp4.formats.scheme import Scheme
from omnifp4.receipt.evaluation import SpeechFloor
from omnifp4.receipt.speech_search import SpeechSearchReceipt, SpeechTrial
from omnifp4.report.figures import figure, size_text
from omnifp4.tiny import write_tiny_omni

SEARCHES = {"speech": (Scheme.NVFP4, Scheme.FP8), "speech-others": (Scheme.MXFP4, Scheme.INT8)}
"""Schemes by name of the record."""
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


def table(found: SpeechSearchReceipt, others: SpeechSearchReceipt) -> Iterator[str]:
    """Lines of Markdown: a row for each trial."""
    yield "| rounded | scheme | weights | KL, first codes | KL, later codes | KL, last quarter | codes equal | digits | borne |"
    yield "|---|---|---|---|---|---|---|---|---|"
    yield _row("nothing, another attention (the floor)", "bf16", "", found.floor, "")
    yield _trial_row(found.base_alone, found.base)
    names = list(dict.fromkeys(trial.name for trial in found.trials))
    for name in names:
        for trial in (*found.trials, *others.trials):
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
    later, last = speech.later_code_kl_mean, speech.drift[-1] if speech.drift else None
    heard = speech.recognition
    cells = [
        name,
        scheme,
        weights,
        _estimate(speech.code_kl_mean),
        _estimate(later),
        _estimate(last),
        f"{100 * speech.code_agreement.value:.0f} % ({100 * speech.code_agreement.low:.0f} … {100 * speech.code_agreement.high:.0f})",
        "" if heard is None else f"{round(heard.model * heard.utterances)} of {heard.utterances}",
        borne,
    ]
    return f"| {' | '.join(cells)} |"


def _estimate(value: Any) -> str:
    return "" if value is None else f"{figure(value.value)} ({figure(value.low)} … {figure(value.high)})"


def page(found: SpeechSearchReceipt, others: SpeechSearchReceipt, command: str) -> str:
    """The table with what it was made of."""
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {found.device}, torch {metadata.version('torch')}"
    borne = ", ".join(f"{name} in {scheme}" for name, scheme in found.chosen.items()) or "nothing"
    return "\n".join(
        [
            f"Written by `{command}` on {found.environment.made_at[:10]}; {machine}, transformers "
            f"{metadata.version('transformers')}, omnifp4 {found.environment.omnifp4}. {found.utterances} spoken answers "
            f"({found.long_utterances} of them long), {found.frames:,} frames, data SHA-256 {found.data_sha256[:12]}; "
            f"borne is up to {found.times_floor:g} times the floor. 95 % intervals.",
            "",
            *table(found, others),
            "",
            f"Chosen: {borne}.",
            "",
        ]
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, help="a wide checkpoint; the bundled tiny model if not given")
    arguments.add_argument("--every", type=int, default=5, help="speak every so many answers of the tasks in text")
    arguments.add_argument("--folder", type=Path, help="for records; a new temporary one if not given")
    arguments.add_argument("--docs", type=Path, help="file to write the tables to")
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
    for name, schemes in SEARCHES.items():
        settings = SpeechSearchSettings(data=data, schemes=schemes, cache=folder / "cache", name=f"own-{name}")
        found[name] = search_speech(model, settings, show)
        sys.stderr.write("\n")
        (folder / f"{name}.json").write_text(found[name].model_dump_json(indent=2) + "\n", encoding="utf-8")
    text = page(
        found["speech"], found["speech-others"], " ".join(["python", "benchmarks/speech_recipes.py", *sys.argv[1:]])
    )
    if chosen.docs:
        chosen.docs.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
