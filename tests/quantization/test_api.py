"""The verbs as functions of the package."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import omnifp4
from omnifp4.checkpoint import hub, units
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.errors import OutputError, RecipeError


@pytest.mark.parametrize(
    "first",
    [
        "import omnifp4.quantization.run",
        "from omnifp4.verification import run",
        "import omnifp4.conversion",
        "import omnifp4",
    ],
)
def test_a_verb_is_a_function_whatever_was_imported_before(first: str) -> None:
    code = (
        f"import omnifp4; before = omnifp4.quantize\n{first}\n"
        "import omnifp4.quantization.plan as room\n"
        "from omnifp4 import convert, plan, quantize, repair, verify\n"
        "assert callable(room.plan_job)\n"
        "for verb in (before, convert, plan, quantize, repair, verify):\n"
        "    try:\n"
        "        verb()\n"
        "    except TypeError as error:\n"
        "        assert 'missing' in str(error), error\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_little() -> None:
    code = "import sys, omnifp4; print(len({'numpy', 'pydantic', 'rich', 'typer', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "0\n"


def test_signatures_can_be_looked_up() -> None:
    assert list(inspect.signature(omnifp4.quantize).parameters)[:2] == ["model", "out"]
    assert "against" in inspect.signature(omnifp4.verify).parameters


def test_a_tilde_is_the_home_folder(tiny_omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_omni.parent))
    assert omnifp4.plan(f"~/{tiny_omni.name}").tensors == omnifp4.plan(tiny_omni).tensors
    receipt = omnifp4.quantize(f"~/{tiny_omni.name}", tmp_path / "out")
    assert receipt.source.model == tiny_omni.name


def test_nothing_is_downloaded_for_a_choice_that_is_wrong(
    tiny_omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object) -> Path:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr(hub, "fetch_headers", lambda model, revision: open_checkpoint(tiny_omni))
    monkeypatch.setattr(hub, "fetch_model", download)
    with pytest.raises(RecipeError, match=r"thinker\.experts"):
        omnifp4.quantize("Some/Model", tmp_path / "out", components=["thinker.expert=nvfp4"])
    with pytest.raises(OutputError, match="exists already"):
        omnifp4.quantize("Some/Model", tmp_path)
    monkeypatch.setattr(units, "free_bytes", lambda out: 1000)
    with pytest.raises(OutputError, match=r"needs [0-9,]+ bytes and the disk has 1,000 free"):
        omnifp4.quantize("Some/Model", tmp_path / "out")
    with pytest.raises(AssertionError, match="weights were fetched"):
        monkeypatch.setattr(units, "free_bytes", lambda out: 10**12)
        omnifp4.quantize("Some/Model", tmp_path / "out")
    assert not list(tmp_path.iterdir())
