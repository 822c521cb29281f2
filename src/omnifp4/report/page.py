"""A gathered receipt as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.contents import key_figures, sections
from omnifp4.report.drawing import clean
from omnifp4.report.schemes import headline
from omnifp4.report.sections.base import Figure, Section, Table

WIDTHS: Final = {"wide": 920.0, "narrow": 320.0}
"""Every picture is drawn twice, in px: for a desk and for a phone; the style sheet shows one."""
PICTURE_WIDTH: Final = 820.0
"""Of a picture in a file of its own, in px: what a README shows without shrinking it."""
LONG: Final = 46
"""Characters from which a cell may take several lines."""
SMALL_NUMBER: Final = re.compile(r"[\d.]+e-\d+")
"""Browsers break a line behind its hyphen."""


def html_page(receipt: GatheredReceipt) -> str:
    """The whole page. All text of the receipt is escaped; control characters are replaced."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FunctionLoader(_template),
        finalize=lambda value: clean(value) if type(value) is str else value,
        keep_trailing_newline=True,
    )
    environment.globals.update(cell_class=_cell_class, state_class=_state_class, drawn=_drawn)
    environment.filters.update(whole=_whole, stacked=_stacked)
    return environment.get_template("report.html.jinja").render(
        title=headline(receipt),
        model_type=receipt.model_type,
        version=receipt.environment.omnifp4,
        style=Markup(plot_style() + _template("page.css")),
        key_figures=key_figures(receipt),
        notes=receipt.notes,
        sections=sections(receipt),
    )


def plot_style() -> str:
    """Colours and type of the pictures, light and dark (CSS)."""
    return _template("report.css")


def _template(name: str) -> str:
    return (resources.files("omnifp4.report") / "templates" / name).read_text(encoding="utf-8")


def _drawn(section: Section, number: int, figure: Figure, variant: str) -> Markup:
    return Markup(figure.draw(f"{section.key}-{number}-{variant}", WIDTHS[variant]).inline())


def _whole(text: str) -> Markup:
    """Escaped text whose numbers are not broken."""
    escaped = str(escape(clean(text)))
    return Markup(SMALL_NUMBER.sub(lambda match: f'<span class="whole">{match[0]}</span>', escaped))


def _stacked(text: str) -> Markup:
    """Escaped text of a numeric cell: what stands in brackets behind a number goes below it."""
    value, bracket, rest = text.partition(" (")
    return Markup("<br>".join(str(escape(clean(part))) for part in (value, bracket.strip() + rest) if part))


def _state_class(state: str) -> str:
    return " " + state.replace(" ", "-") if state in ("pass", "fail", "not checked", "none") else ""


def _cell_class(table: Table, column: int, cell: str, state: str) -> Any:
    names = []
    if column in table.numeric:
        names.append("n")
        names += ["told"] if len(cell) >= LONG else []
    elif state and cell == state:
        names.append(_state_class(state).strip())
    elif len(cell) >= LONG and " " not in cell:
        names.append("hash")
    elif len(cell) >= LONG:
        names.append("long")
    return Markup(f' class="{" ".join(names)}"') if names else ""
