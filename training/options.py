"""The command line of ``python -m training``, and the settings that are no options."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

STAGES = ("codec", "thinker", "eye", "talker", "examine")
SHARES = {"judge": 0.03, "ear": 0.03, "codec": 0.62, "thinker": 0.73, "eye": 0.1, "talker": 0.17}
"""Of the minutes. Thinker, eye and talker follow one another; judge, ear and codec run beside thinker and eye."""
PARTS = {"codec": ("judge", "ear", "codec")}
"""What a stage trains, where it is not one thing of the stage's name."""
RATES = {"judge": 2e-3, "ear": 2e-3, "codec": 1e-3, "thinker": 1.5e-3, "eye": 8e-4, "talker": 2e-3}
"""Highest learning rates."""
AGAIN = 0.7
"""Times the rates, for what goes on from an earlier result."""
ROW_TOKENS = 96
"""Tokens of a row in training; the few conversations that are longer are left out."""
TASKS = {"picture": 3, "sound": 2.5, "two": 5, "arithmetic": 1.5, "repeat": 3.5, "continue": 0.7, "text": 1.2}
"""Shares of a thinker's batch. Of text little: there are 0.86 million tokens of it, and a run must not read them often."""
SPEECH_TASKS = {"picture": 2, "sound": 2, "two": 2, "arithmetic": 2, "repeat": 3, "continue": 0.3}
"""Shares of a talker's batch."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m training", description="Trains the tiny omni model.")
    verbs = result.add_subparsers(dest="verb", required=True)
    prepare = verbs.add_parser("prepare", help="pack folders of open data into one file")
    prepare.add_argument("--recordings", type=Path, required=True, help="folder of {digit}_{speaker}_{index}.wav")
    prepare.add_argument("--text", type=Path, nargs="+", required=True, help="plain text files")
    prepare.add_argument("--out", type=Path, required=True)
    forms = verbs.add_parser("forms", help="ask a trained checkpoint for held-out digits in other forms")
    forms.add_argument("--data", type=Path, required=True, help="what `prepare` wrote")
    forms.add_argument("--checkpoint", type=Path, required=True, help="as `omnifp4.tiny.write_tiny_omni` writes it")
    forms.add_argument("--every", type=int, default=8, help="ask for one in so many of what is held out")
    card = verbs.add_parser("card", help="print the model card's tables")
    card.add_argument("--data", type=Path, required=True, help="what `prepare` wrote")
    card.add_argument("--results", type=Path, required=True, help="results.json of a training")
    train = verbs.add_parser("train", help="train")
    train.add_argument("--data", type=Path, required=True, help="what `prepare` wrote")
    train.add_argument("--out", type=Path, required=True, help="folder of the results")
    train.add_argument(
        "--work", type=Path, help="folder of the stages' full-precision results; OUT/../work if not given"
    )
    train.add_argument("--from", dest="before", type=Path, help="folder of an earlier result, whose weights go on")
    train.add_argument("--on-call", action="store_true", help=argparse.SUPPRESS)
    train.add_argument("--stage", choices=STAGES, action="append", help="run these stages only, even if done")
    train.add_argument("--minutes", type=float, default=8.0, help="of training, in all")
    train.add_argument(
        "--most-minutes",
        type=float,
        help="of the whole run: stages train shorter where the examination would come too late",
    )
    for stage, share in SHARES.items():
        train.add_argument(f"--{stage}-minutes", type=float, help=f"of this part alone; {share} of all if not given")
    train.add_argument("--pictures", type=int, default=448, help="pictures in a batch, in conversations or alone")
    train.add_argument("--eye-pictures", type=int, default=256, help="pictures in a batch of the eye's stage")
    train.add_argument("--sounds", type=int, default=208, help="recordings in a batch, in conversations or alone")
    train.add_argument("--crops", type=int, default=48, help="crops of sound in a batch of the codec")
    train.add_argument("--step-by-step", action="store_true", help="no CUDA graphs")
    train.add_argument("--rows", type=int, default=384, help="conversations in a batch")
    train.add_argument("--workers", type=int, default=max(0, min(10, (os.cpu_count() or 2) - 5)))
    train.add_argument("--device", default=None, help="cuda if there is one, else cpu")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--takes", type=int, default=10, help="how often each voice says each digit in the examination")
    train.add_argument("--examples", type=int, default=400, help="most held-out examples of a kind in the examination")
    return result


def planned(options: argparse.Namespace, stage: str) -> float:
    """Seconds that a stage trains, all its parts together."""
    seconds = 0.0
    for part in PARTS.get(stage, (stage,)):
        minutes = getattr(options, f"{part}_minutes")
        seconds += 60 * (SHARES[part] * options.minutes if minutes is None else minutes)
    return seconds
