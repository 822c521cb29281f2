"""The README's example runs, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from omnifp4.cli.main import app

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_example_runs(tiny_omni: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("transformers")
    image.new("RGB", (56, 56), (200, 30, 30)).save(tmp_path / "cat.png")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for name, path in (("MODEL", tiny_omni), ("OUT", tmp_path / "out"), ("cat.png", tmp_path / "cat.png")):
        code = code.replace(f'"{name}"', repr(str(path)))
    code = code.replace("images=[", "max_new_tokens=4, images=[")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_every_command_named_there_exists() -> None:
    commands = set(re.findall(r"^omnifp4 ([\w-]+)", README, re.MULTILINE))
    assert len(commands) >= 9
    assert commands <= set(get_command(app).commands)  # type: ignore[attr-defined]
