"""Runs the command line as a person does: another process, its exit status and its two streams."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRESS = re.compile(r"quantize: \d+%, ")
PROGRAM = [sys.executable, "-m", "omnifp4"]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``omnifp4 ARGUMENTS`` to its end."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"} | options.pop("environment", {})
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run([*PROGRAM, *map(str, arguments)], env=environment, check=False, **settings)


def refused(done: subprocess.CompletedProcess[str], *told: str, status: int = 2) -> str:
    """Assert that a run was refused as it should be, and return its one line."""
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    # On a busy machine a run may take long enough to tell how far it is.
    lines = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for text in told:
        assert text in lines[0], lines[0]
    return lines[0]


def nothing_whole(out: Path) -> None:
    """Assert that there is no OUT, and nothing in OUT.partial that could be taken for a checkpoint."""
    assert not os.path.lexists(out)
    partial = out.with_name(out.name + ".partial")
    assert not (partial / "config.json").exists()
