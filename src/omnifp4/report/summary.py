"""A gathered receipt as a person reads it in a terminal: key figures, then each section's result."""

from __future__ import annotations

from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.contents import key_figures, sections
from omnifp4.report.drawing import clean
from omnifp4.report.schemes import headline
from omnifp4.report.sections.base import Table

STYLES = {"pass": "green", "fail": "bold red", "not checked": "yellow", "not measured": "yellow", "none": "dim"}
MOST_ROWS: Final = 8
"""Of a table in a terminal."""


def report_text(receipt: GatheredReceipt) -> RenderableType:
    """The summary; what was not measured is told with the command that measures it."""
    shown: list[RenderableType] = [key_figures_text(receipt), Text()]
    for section in sections(receipt):
        line = Text(f"{section.title}: ", style="bold")
        if section.missing:
            line.append(f"not measured; {section.missing}", style="dim")
        else:
            line.append(clean(section.lead), style="not bold")
        shown.append(line)
        shown += [table_text(table) for table in section.tables if table.brief and not table.folded]
    shown += [Text(clean(f"note: {note}"), style="yellow") for note in receipt.notes]
    return Group(*shown)


def key_figures_text(receipt: GatheredReceipt) -> RenderableType:
    """The figures that are read first."""
    figures = RichTable(
        title=Text(clean(headline(receipt))),
        title_justify="left",
        box=None,
        show_header=False,
        padding=(0, 2, 0, 0),
    )
    for item in key_figures(receipt):
        figures.add_row(
            Text(item.name),
            Text(clean(item.value), style=STYLES.get(item.state, "bold")),
            Text(clean(item.note), style="dim"),
        )
    return figures


def table_text(table: Table) -> RenderableType:
    """The brief columns of a table, and of a long one its first rows."""
    result = RichTable(
        title=Text(clean(table.caption), style="italic"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for number in table.brief:
        result.add_column(Text(table.columns[number]), justify="right" if number in table.numeric else "left")
    for number, row in enumerate(table.rows[:MOST_ROWS]):
        state = table.states[number] if table.states else ""
        cells = [row[column] for column in table.brief]
        result.add_row(*(Text(clean(cell), style=STYLES.get(state, "") if cell == state else "") for cell in cells))
    if len(table.rows) > MOST_ROWS:
        more = Text(f"… {len(table.rows) - MOST_ROWS:,} more (the page and --json have them)", style="dim")
        return Group(result, more)
    return result
