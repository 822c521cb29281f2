"""Sections of a report as Markdown, for the model card of an artifact."""

from __future__ import annotations

import re
from typing import Final

from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.contents import sections
from omnifp4.report.drawing import clean
from omnifp4.report.sections.base import Section, Table

CARD_SECTIONS: Final = ("proof", "quality", "sensitivity", "speed", "fit")
"""What the rest of the card does not tell already."""
SPECIAL: Final = re.compile(r"([\\`*\[\]<>|&~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def measured_markdown(receipt: GatheredReceipt) -> str:
    """What was measured, and what was not, under headings of the second level."""
    blocks: list[str] = []
    absent: list[Section] = []
    for section in sections(receipt):
        if section.key not in CARD_SECTIONS:
            continue
        if section.missing:
            absent.append(section)
            continue
        blocks += [f"## {section.title}", escaped(section.lead)]
        blocks += [_table(table) for table in section.tables if not table.folded]
        blocks += ["\n".join(f"- {escaped(note)}" for note in section.notes)] if section.notes else []
    if absent:
        blocks += ["## Not measured", "\n".join(f"- {section.title}: `{section.missing}`" for section in absent)]
    origins = [f"`{file.receipt}` {file.sha256[:16]}" for file in receipt.files]
    blocks.append(
        f"Rendered by omnifp4 {receipt.environment.omnifp4} from {len(origins)} receipts (SHA-256): {', '.join(origins)}."
    )
    return "\n\n".join(blocks)


def escaped(text: str) -> str:
    """Text as Markdown that shows it as it is, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(clean(text).split(" ")))


def _table(table: Table) -> str:
    lines = [f"**{escaped(table.caption)}**", ""]
    lines.append(f"| {' | '.join(map(escaped, table.columns))} |")
    lines.append(f"|{'|'.join('---:' if n in table.numeric else '---' for n in range(len(table.columns)))}|")
    lines += [f"| {' | '.join(map(escaped, row))} |" for row in table.rows]
    return "\n".join(lines)
