"""A small SVG canvas: shapes with CSS classes, text that is escaped, a title and a description for screen readers.

Colours are not drawn: every shape names a class, and the style sheet around it (or inside it, for a picture that stands
alone) gives the class its colour in the light and in the dark.
"""

from __future__ import annotations

import unicodedata
from html import escape
from typing import Final, Literal

Anchor = Literal["start", "middle", "end"]

CHARACTER_WIDTH: Final = 7.1
"""Mean width of a character at the 13 px of the plots' text, in px: to leave room for labels, not to set type."""


def text_width(text: str) -> float:
    """About how wide a label is, in px; Chinese, Japanese and Korean characters take twice the room of others."""
    return CHARACTER_WIDTH * sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def shortened(text: str, width: float) -> str:
    """`text`, cut in its middle to fit about `width` px."""
    most = max(int(width / CHARACTER_WIDTH), 3) * CHARACTER_WIDTH
    if text_width(text) <= most:
        return text
    kept = len(text)
    while kept > 2:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[len(text) - kept + kept // 2 :]}"
        if text_width(short) <= most:
            return short
    return "…"


def clean(text: str) -> str:
    """Text without the control characters that neither XML nor HTML can hold, and without those that turn its direction."""
    return "".join(" " if c in "\t\r\n" else "\ufffd" if _unfit(ord(c)) else c for c in text)


def _unfit(code: int) -> bool:
    return (
        code < 0x20
        or 0x7F <= code < 0xA0
        or 0xD800 <= code < 0xE000
        or 0x202A <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
        or code & 0xFFFE == 0xFFFE
    )


MARGIN: Final = 16
"""Px around a picture that stands alone."""
HEADLINE: Final = 30
"""Px above it for its title, which on a page stands below the picture."""


class Drawing:
    """One picture; lengths are in px, y grows downward."""

    def __init__(self, key: str, width: float, height: float, *, title: str, description: str) -> None:
        """Args:
        key: unique in a page; ids are made of it.
        title: what the picture shows.
        description: what there is to see in it, in words and figures.
        """
        self.key = key
        self.width = width
        self.height = height
        self.title = title
        self.description = description
        self._shapes: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, name: str, *, radius: float = 0) -> None:
        """A filled rectangle of class `name`."""
        rounded = f' rx="{_n(radius)}"' if radius else ""
        self._shapes.append(
            f'<rect class="{name}" x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(height)}"{rounded}/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, name: str) -> None:
        """A straight line of class `name`."""
        self._shapes.append(f'<line class="{name}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>')

    def circle(self, x: float, y: float, radius: float, name: str) -> None:
        """A disc of class `name`."""
        self._shapes.append(f'<circle class="{name}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"/>')

    def path(self, commands: str, name: str) -> None:
        """A path of class `name`; `commands` are numbers and letters made by the caller, never input."""
        self._shapes.append(f'<path class="{name}" d="{commands}"/>')

    def text(self, x: float, y: float, text: str, name: str = "label", *, anchor: Anchor = "start") -> None:
        """Text with its base line at `y`."""
        placed = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._shapes.append(f'<text class="{name}" x="{_n(x)}" y="{_n(y)}"{placed}>{escape(clean(text))}</text>')

    def inline(self) -> str:
        """The picture for a page that has the style sheet."""
        return self._svg("")

    def standalone(self, style: str) -> str:
        """The picture as a file of its own, with `style` (CSS) inside.

        It brings its ground (class ``ground``) along: what shows it may be dark where the reader's system is light.
        """
        ground = (
            f'<rect class="ground" x="{-MARGIN}" y="{-MARGIN - HEADLINE}" width="{_n(self.width + 2 * MARGIN)}" '
            f'height="{_n(self.height + 2 * MARGIN + HEADLINE)}" rx="8"/>'
        )
        headline = f'<text class="headline" x="0" y="-14">{escape(clean(shortened(self.title, self.width)))}</text>'
        return self._svg(f"<style>{style}</style>{ground}{headline}", margin=MARGIN, above=HEADLINE) + "\n"

    def _svg(self, style: str, *, margin: int = 0, above: int = 0) -> str:
        title, description = f"{self.key}-title", f"{self.key}-description"
        space = ' xmlns="http://www.w3.org/2000/svg"' if margin else ""
        width, height = _n(self.width + 2 * margin), _n(self.height + 2 * margin + above)
        return (
            f'<svg{space} class="plot" role="img" aria-labelledby="{title} {description}" '
            f'viewBox="{-margin} {-margin - above} {width} {height}" width="{width}" height="{height}">'
            f'<title id="{title}">{escape(clean(self.title))}</title>'
            f'<desc id="{description}">{escape(clean(self.description))}</desc>'
            f"{style}{''.join(self._shapes)}</svg>"
        )


def _n(value: float) -> str:
    """A coordinate: a hundredth of a px is finer than any screen."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
