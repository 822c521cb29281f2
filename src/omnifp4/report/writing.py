"""Writes reports: a page, the gathered receipt, and the measured part of an artifact's model card."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from omnifp4.errors import OutputError
from omnifp4.receipt.base import Record, as_text
from omnifp4.receipt.gathered import GatheredFile, GatheredReceipt
from omnifp4.report.gathering import ARTIFACT_RECEIPT, gathered, read_receipts
from omnifp4.report.model_card import MEASURED_BEGIN, MEASURED_END, model_card
from omnifp4.report.reading import ReceiptError

CARD: Final = "README.md"
OURS: Final = {".html": '<meta name="generator" content="omnifp4 ', ".json": '"receipt": "report"'}
"""By ending: what a file holds, near its beginning, that an earlier run made and that may be replaced."""
BEGINNING: Final = 2000


def write_report(
    receipts: Iterable[str | Path | Record],
    out: str | Path | Iterable[str | Path] = (),
    *,
    card: str | Path | None = None,
    pictures: str | Path | None = None,
) -> GatheredReceipt:
    """Gather receipts and render them.

    Args:
        receipts: files of receipts, artifact folders, or records that a verb returned.
        out: files to write: ``.html`` for the page, ``.json`` for the gathered receipt. An earlier report is replaced.
        pictures: folder, made if need be, for every picture as an SVG file of its own, such as ``size.svg``.
        card: folder of an artifact; what was measured is put into its README.md. Its receipt need not be given again.

    Returns:
        The gathered receipt.

    Raises:
        ReceiptError: a receipt cannot be read, is of another version, or two do not belong together.
        OutputError: a file cannot be written, or is none of ours and would be overwritten.
    """
    outs = [Path(out)] if isinstance(out, str | Path) else [Path(item) for item in out]
    given = list(receipts)
    if card is not None:
        given.insert(0, Path(card) / ARTIFACT_RECEIPT)
    for path in outs:
        _refuse_foreign(path)
    found: list[tuple[GatheredFile, Record]] = []
    for item in given:
        found += [_in_memory(item)] if isinstance(item, Record) else read_receipts(Path(item))
    receipt = gathered(found)
    for path in outs:
        text = _rendered(receipt, path.suffix.lower())
        _write(path, text)
    if pictures is not None:
        write_pictures(Path(pictures), receipt)
    if card is not None:
        write_card(Path(card), receipt)
    return receipt


def write_pictures(folder: Path, receipt: GatheredReceipt) -> list[Path]:
    """Write every picture of a report as an SVG file that needs nothing else, light and dark as its reader is.

    Returns:
        The files, ``SECTION.svg`` or ``SECTION-2.svg`` …

    Raises:
        OutputError: a file cannot be written.
    """
    from omnifp4.report.contents import sections
    from omnifp4.report.page import PICTURE_WIDTH, plot_style

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{as_text(str(folder))}: cannot be made: {error.strerror or error}") from error
    written = []
    for section in sections(receipt):
        for number, figure in enumerate(section.figures, start=1):
            path = folder / f"{section.key}{f'-{number}' if number > 1 else ''}.svg"
            _write(path, figure.draw(section.key, PICTURE_WIDTH).standalone(plot_style()))
            written.append(path)
    return written


def write_card(artifact: Path, receipt: GatheredReceipt) -> None:
    """Put what was measured into an artifact's README.md, between its two marks; all other text stays.

    Raises:
        ReceiptError: the receipts hold none of the artifact's own.
        OutputError: the card has no marks, or cannot be written.
    """
    from omnifp4.report.markdown import measured_markdown

    if receipt.quantization is None:
        raise ReceiptError(f"{as_text(str(artifact))}: {ARTIFACT_RECEIPT} is not among the receipts")
    path = artifact / CARD
    name = as_text(str(path))
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else model_card(receipt.quantization)
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{name}: cannot be read: {error}") from error
    before, begin, rest = text.partition(MEASURED_BEGIN)
    _, end, after = rest.partition(MEASURED_END)
    if not begin or not end:
        raise OutputError(
            f"{name}: lacks the marks {MEASURED_BEGIN} and {MEASURED_END} around what was measured",
            hint=f"move {CARD} away and run again: a whole card is written",
        )
    _write(path, f"{before}{MEASURED_BEGIN}\n\n{measured_markdown(receipt)}\n\n{MEASURED_END}{after}")


def _rendered(receipt: GatheredReceipt, ending: str) -> str:
    if ending == ".json":
        return receipt.model_dump_json(indent=2) + "\n"
    from omnifp4.report.page import html_page

    return html_page(receipt)


def _refuse_foreign(path: Path) -> None:
    name, ending = as_text(str(path)), path.suffix.lower()
    if ending not in OURS:
        raise OutputError(
            f"{name}: ends with {ending or 'nothing'!r}; a report is .html or .json", hint="-o report.html"
        )
    if not path.parent.is_dir():
        raise OutputError(f"{name}: there is no folder {as_text(str(path.parent))}", hint="make it first")
    try:
        if os.path.lexists(path):
            with path.open(encoding="utf-8", errors="replace") as file:
                if OURS[ending] not in file.read(BEGINNING):
                    raise OutputError(f"{name}: is there and is no report of omnifp4", hint="choose another name")
    except OSError as error:
        raise OutputError(f"{name}: cannot be written: {error.strerror or error}") from error


def _in_memory(record: Record) -> tuple[GatheredFile, Record]:
    kind = str(getattr(record, "receipt", type(record).__name__))
    sha256 = hashlib.sha256(record.model_dump_json().encode()).hexdigest()
    return GatheredFile(name=kind, receipt=kind, sha256=sha256), record


def _write(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{as_text(str(path))}: cannot be written: {error.strerror or error}") from error
