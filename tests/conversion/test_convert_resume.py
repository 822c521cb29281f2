"""A run that is killed goes on where it was and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damaging import Damaged

from omnifp4.conversion import convert, repair, writing
from omnifp4.errors import OutputError
from omnifp4.receipt.base import Verdict
from omnifp4.verification import verify
from small_checkpoints import folder_bytes

SMALL_UNIT = 150_000
DOWN = "thinker.model.layers.0.mlp.experts.1.down_proj"
GATE = "thinker.model.layers.0.mlp.experts.1.gate_proj"

KILLED = """
import os, signal, sys
from pathlib import Path
from omnifp4.conversion import convert, repair, writing

writing.COPY_UNIT_BYTES = int(sys.argv[4])
calls = 0

def stop(done, total, what):
    global calls
    calls += 1
    if calls == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)

source, out = Path(sys.argv[2]), Path(sys.argv[3])
if sys.argv[1] == "repair":
    repair(source, out, threads=1, progress=stop)
else:
    convert(source, out, sys.argv[1], threads=1, progress=stop)
"""


def run_and_kill(verb: str, source: Path, out: Path, after: int) -> None:
    command = [sys.executable, "-c", KILLED, verb, str(source), str(out), str(SMALL_UNIT), str(after)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    assert out.with_name("out.partial").is_dir()


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in folder_bytes(folder).items() if name not in {"omnifp4.json", "README.md"}}


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "COPY_UNIT_BYTES", SMALL_UNIT)


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_conversion(omni_artifacts: dict[str, Path], tmp_path: Path, after: int) -> None:
    source, out = omni_artifacts["modelopt"], tmp_path / "out"
    convert(source, tmp_path / "whole", "compressed-tensors")
    run_and_kill("compressed-tensors", source, out, after)
    with pytest.raises(OutputError, match="--resume"):
        convert(source, out, "compressed-tensors")
    receipt = convert(source, out, "compressed-tensors", resume=True)
    assert receipt.resumed_units == after
    assert weights(out) == weights(tmp_path / "whole")
    assert verify(out).verdict is Verdict.PASS


def test_what_was_damaged_meanwhile_is_done_again(omni_artifacts: dict[str, Path], tmp_path: Path) -> None:
    source, out = omni_artifacts["modelopt"], tmp_path / "out"
    convert(source, tmp_path / "whole", "compressed-tensors")
    run_and_kill("compressed-tensors", source, out, 4)
    for shard in out.with_name("out.partial").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 8 :: 997] = bytes(len(data[len(data) // 8 :: 997]))
        shard.write_bytes(data)
    assert convert(source, out, "compressed-tensors", resume=True).resumed_units < 4
    assert weights(out) == weights(tmp_path / "whole")


def test_a_leftover_of_another_job_is_refused(omni_artifacts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_and_kill("compressed-tensors", omni_artifacts["modelopt"], out, 2)
    with pytest.raises(OutputError, match="another job"):
        convert(omni_artifacts["compressed-tensors"], out, "modelopt", resume=True)


def test_a_killed_repair(omni_artifacts: dict[str, Path], tmp_path: Path) -> None:
    artifact = Damaged(omni_artifacts["modelopt"])
    artifact.block_scales(DOWN)[0, 0] = 0x7F
    artifact.set_tensor_scale(GATE, float(artifact.tensor_scale(GATE)) * 1.3)
    source, out = artifact.write(tmp_path / "in"), tmp_path / "out"
    repair(source, tmp_path / "whole", threads=1)
    run_and_kill("repair", source, out, 3)
    receipt = repair(source, out, resume=True)
    assert receipt.resumed_units == 3
    assert weights(out) == weights(tmp_path / "whole")
    changed = Damaged(out)
    assert np.isfinite(changed.tensors[f"{DOWN}.weight_scale"].values).all()
    assert verify(out).verdict is Verdict.PASS
