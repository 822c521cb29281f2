"""A sensitivity map as a person reads it in a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from omnifp4.receipt.sensitivity import SensitivityReceipt
from omnifp4.report.sections.sensitivity import sensitivity_section_of
from omnifp4.report.summary import table_text


def sensitivity_text(receipt: SensitivityReceipt) -> RenderableType:
    """What costs most, and the tables of components, layers and experts."""
    section = sensitivity_section_of(receipt)
    shown: list[RenderableType] = [Text(section.lead)]
    shown += [table_text(table) for table in section.tables]
    return Group(*shown, Text("\n".join(f"note: {note}" for note in section.notes), style="dim"))
