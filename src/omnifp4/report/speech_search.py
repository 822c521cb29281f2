"""A search for what speech bears, as a person reads it in a terminal."""

from __future__ import annotations

from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from omnifp4.receipt.evaluation import Estimate, SpeechFloor
from omnifp4.receipt.speech_search import SpeechSearchReceipt, SpeechTrial
from omnifp4.report.figures import figure, size_text

NOTHING: Final = 1e-12
"""Nats."""


def speech_search_text(receipt: SpeechSearchReceipt) -> RenderableType:
    """A row for each trial, why some are too much, and what was chosen.

    KL in nats of the first codes of frames, of the later ones, and of the first ones in the last quarter of long answers.
    """
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("rounded", "to", "saves", "KL first", "later", "last ¼", "equal", "digits", "borne"):
        table.add_column(column, no_wrap=True)
    table.add_row("nothing (the floor)", "bf16", "", *_cells(receipt.floor), "")
    trials = (receipt.base_alone, *receipt.trials, *receipt.together, *filter(None, [receipt.with_base]))
    for trial in trials:
        schemes = list(dict.fromkeys(trial.schemes.values()))
        scheme = schemes[0] if len(schemes) == 1 else "mixed"
        saved = size_text(trial.bytes_before - trial.bytes_after)
        table.add_row(trial.name, scheme, saved, *_cells(trial.speech), "no" if trial.exceeds else "yes")
    lines = [f"{_name(trial)}: {'; '.join(trial.exceeds)}" for trial in trials if trial.exceeds]
    chosen = ", ".join(f"{name} in {scheme}" for name, scheme in receipt.chosen.items())
    told = f"chosen: {chosen}; the rest of what speaks stays wide" if chosen else "all that speaks stays wide"
    head = (
        f"{receipt.utterances:,} spoken answers, {receipt.frames:,} frames; borne is up to {receipt.times_floor:g} times "
        "the noise floor's KL (of first codes, later codes, and the last quarter of long answers), and no digit lost"
    )
    return Group(Text(head), table, Text("\n".join(lines), style="dim"), Text(told, style="bold"))


def _cells(speech: SpeechFloor) -> tuple[str, ...]:
    heard = speech.recognition
    return (
        _figure(speech.code_kl_mean),
        _figure(speech.later_code_kl_mean),
        _figure(speech.drift[-1] if speech.drift else None),
        f"{speech.code_agreement.value:.0%}",
        "-" if heard is None else f"{heard.model:.0%}",
    )


def _figure(value: Estimate | None) -> str:
    if value is None:
        return "-"
    # Below that it is the rounding of what is kept of the reference.
    return "0" if value.value < NOTHING else figure(value.value)


def _name(trial: SpeechTrial) -> str:
    return f"{trial.name} in {next(iter(trial.schemes.values()))}" if len(trial.schemes) == 1 else trial.name
