"""What a report is made of: sections of words, figures and tables that every renderer shows in its own way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from omnifp4.report.drawing import Drawing

TO: Final = "\u00a0to\u00a0"
"""Between the ends of an interval, which stay on one line."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; the first column names its row.

    Attributes:
        numeric: columns that are set to the right.
        states: for each row ``pass``, ``fail``, ``not checked`` or ""; empty where no row has one.
        folded: long, and shown only when asked for.
        brief: columns that a terminal shows; empty: it leaves the table to the page.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    states: tuple[str, ...] = ()
    folded: bool = False
    brief: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture that is drawn for a key and a width in px."""

    caption: str
    draw: Callable[[str, float], Drawing]


@dataclass(frozen=True, slots=True)
class Section:
    """One subject.

    Attributes:
        key: anchor in a page.
        lead: the result in a sentence or two.
        notes: what has to be known to read it rightly.
        missing: the command that would measure it, where it was not measured; then there is nothing else.
    """

    key: str
    title: str
    lead: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    missing: str = ""


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A number that is read first; `state` as in `Table.states`."""

    name: str
    value: str
    note: str
    state: str = ""


def ratio_text(before: float, after: float) -> str:
    """How much smaller, such as ``2.56x smaller``."""
    if before <= 0 or after <= 0:
        return "no ratio"
    return f"{before / after:.2f}x smaller" if after <= before else f"{after / before:.2f}x larger"


def percent(share: float | None) -> str:
    """A share as text, with as many digits as 99.87 % needs."""
    return "not measured" if share is None else f"{100 * share:.2f}\u00a0%"
