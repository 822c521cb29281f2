"""docs/report.md: its commands exist, its kinds are those that are read, and its sections are those of a page."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from omnifp4.cli.main import app
from omnifp4.report.contents import sections
from omnifp4.report.gathering import KINDS, SEVERAL, SINGLE, gather
from omnifp4.report.model_card import MEASURED_BEGIN, MEASURED_END

PAGE = (Path(__file__).parents[2] / "docs" / "report.md").read_text("utf-8")


def test_every_command_and_option_exists() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^omnifp4 +(\w+) *(.*)$", PAGE, flags=re.M)
    assert len(lines) > 8
    for verb, rest in lines:
        options = {name for parameter in commands[verb].params for name in parameter.opts}
        used = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest.partition("#")[0]))
        assert used <= options, (verb, used - options)
    evaluate = {name for parameter in commands["evaluate"].params for name in parameter.opts}
    for option in ("--sensitivity", "--each-expert", "--segmented", "--max-kl", "--min-top1", "--lm-eval", "--dtype"):
        assert option in evaluate
        assert option in PAGE


def test_every_kind_of_record_and_every_section_is_told(receipts: dict[str, Path]) -> None:
    told = set(re.findall(r"`([a-z-]+)`", PAGE.partition("| kind | made by |")[2].partition("\n\n")[0]))
    assert told >= {kind for kind, cls in KINDS.items() if cls in SINGLE or cls in SEVERAL}
    for section in sections(gather(receipts.values())):
        assert f"| {section.title} |" in PAGE, section.title
    assert MEASURED_BEGIN in PAGE
    assert MEASURED_END in PAGE
