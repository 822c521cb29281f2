"""A comparison of artifacts as a person reads it in a terminal."""

from __future__ import annotations

from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from omnifp4.receipt.comparison import ArtifactComparison, ComparisonReceipt, Finding
from omnifp4.receipt.evaluation import Estimate
from omnifp4.report.drawing import clean
from omnifp4.report.evaluation import limits_text, narrow_table
from omnifp4.report.figures import figure, size_text
from omnifp4.report.gathering import folder_name

LONGEST_NAME: Final = 10
"""Of an artifact in a table of eighty columns; where one is longer, all get letters."""

FINDING_STYLES = {
    Finding.NEARER: "green", Finding.WORSE: "bold red", Finding.MIXED: "yellow", Finding.SAME: "dim", Finding.TOO_FEW: "yellow",
}  # fmt: skip


def comparison_text(receipt: ComparisonReceipt) -> RenderableType:
    """Sizes, differences to the baseline by modality, task and speech, and what is worth it."""
    names = [folder_name(one.model) for one in receipt.artifacts]
    marks = names if max(map(len, names)) <= LONGEST_NAME else _letters(len(names))
    title = (
        f"{len(names)} artifacts against {receipt.against}: {receipt.samples:,} samples ({receipt.data}), {receipt.dtype}; "
        f"each compared with {folder_name(receipt.baseline)}, sample by sample"
    )
    parts: list[RenderableType] = [Text(clean(title)), _sizes(receipt, names, marks), _divergence(receipt, marks)]
    if (answers := _answers(receipt, marks)).row_count:
        parts.append(answers)
    else:
        parts.append(Text("right answers: the same samples in every artifact"))
    if (speech := _speech(receipt, marks)).row_count:
        parts.append(speech)
    lines = [f"- in a finding: {Finding.SAME.value} from {folder_name(receipt.baseline)}"]
    lines += [f"note: {note}" for note in receipt.notes]
    lines.append(
        f"{receipt.seconds:.1f} s on {receipt.device}; intervals: 95 %, {receipt.resamples:,} paired resamples; --json has all"
    )
    parts.append(Text("\n".join(map(clean, lines))))
    for evaluation, name in zip(receipt.evaluations, names, strict=True):
        if evaluation.gates:
            parts.append(Group(Text(clean(name)), limits_text(evaluation.gates, evaluation.verdict)))
    parts += [_told(one, name) for one, name in zip(receipt.artifacts, names, strict=True)]
    parts.append(Text(clean(receipt.worth), style="bold"))
    return Group(*parts)


def _told(one: ArtifactComparison, name: str) -> Text:
    return Text.assemble(
        (clean(f"{name}: "), "bold"), (clean(one.conclusion), FINDING_STYLES[one.finding] if one.finding else "")
    )


def _letters(count: int) -> list[str]:
    """Short names of artifacts: A to Z, then AA and so on."""
    letters = [chr(ord("A") + number) for number in range(26)]
    return [*letters, *(first + second for first in letters for second in letters)][:count]


def _sizes(receipt: ComparisonReceipt, names: list[str], marks: list[str]) -> Table:
    table = narrow_table("", "artifact", "recipe", "rule", "weights", "bits a weight", "bytes")
    for one, name, mark in zip(receipt.artifacts, names, marks, strict=True):
        name = name if name == mark else f"{mark}  {name}"
        more = "baseline" if one.finding is None else f"{100 * one.more_bytes:+.1f} %"
        table.add_row(
            clean(name), one.recipe, one.rule, size_text(one.weight_bytes), f"{one.bits_per_weight:.2f}", more
        )
    return table


def _divergence(receipt: ComparisonReceipt, names: list[str]) -> Table:
    table = narrow_table("", "in", "artifact", "KL", "more", "95 %", "KL ×", "floor", "finding")
    base = next(name for one, name in zip(receipt.artifacts, names, strict=True) if one.finding is None)
    first = next(one for one in receipt.artifacts if one.finding is not None)
    for place, item in enumerate(first.modalities):
        table.add_row(item.modality, clean(base), figure(item.baseline_kl), *[""] * 5)
        for one, name in zip(receipt.artifacts, names, strict=True):
            if one.finding is None:
                continue
            mine = one.modalities[place]
            table.add_row(
                "", clean(name), figure(mine.kl), figure(mine.kl_difference.value), _span(mine.kl_difference),
                f"{mine.kl_times.value:.2f}" if mine.kl_times else "-",
                figure(mine.floor) if mine.floor is not None else "-",
                _short(mine.finding),
            )  # fmt: skip
    return table


def _answers(receipt: ComparisonReceipt, names: list[str]) -> Table:
    """Tasks in which any sample changed."""
    table = narrow_table("", "right answers", "artifact", "points", "95 %", "lost", "gained", "finding")
    for one, name in zip(receipt.artifacts, names, strict=True):
        for item in one.tasks:
            if item.lost or item.gained:
                table.add_row(
                    clean(item.task), clean(name), f"{100 * item.difference.value:+.1f}",
                    f"{100 * item.difference.low:+.1f} … {100 * item.difference.high:+.1f}", f"{item.lost}", f"{item.gained}",
                    _short(item.finding),
                )  # fmt: skip
    return table


def _speech(receipt: ComparisonReceipt, names: list[str]) -> Table:
    table = narrow_table("", "speech", "codes equal", "95 %", "next code KL", "95 %", "finding")
    for one, name in zip(receipt.artifacts, names, strict=True):
        if (item := one.speech) is not None:
            equal = item.code_agreement
            table.add_row(
                clean(name), f"{100 * equal.value:+.1f}", f"{100 * equal.low:+.1f} … {100 * equal.high:+.1f}",
                figure(item.code_kl.value), _span(item.code_kl), _short(item.finding),
            )  # fmt: skip
    return table


def _short(finding: Finding) -> Text:
    """Two words would take the room of a figure."""
    told = {Finding.SAME: "-", Finding.TOO_FEW: "too few"}.get(finding, finding.value)
    return Text(told, style=FINDING_STYLES[finding])


def _span(estimate: Estimate) -> str:
    return f"{figure(estimate.low)} … {figure(estimate.high)}"
