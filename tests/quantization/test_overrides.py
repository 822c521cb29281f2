"""Every component that can be made FP4 on request gives an artifact that passes its own proof, in both dialects."""

from __future__ import annotations

from pathlib import Path

import pytest

import omnifp4
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.output import OutputWriter, plan_output
from omnifp4.checkpoint.staging import Staging
from omnifp4.checkpoint.units import check_finished
from omnifp4.quantization.decisions import CopyUnit


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("component", ["code_predictor", "talker", "thinker.router", "audio_tower", "code2wav"])
def test_an_unusual_choice_passes_its_proof(tiny_omni: Path, tmp_path: Path, component: str, dialect: str) -> None:
    receipt = omnifp4.quantize(tiny_omni, tmp_path / "out", components=[f"{component}=nvfp4"], format=dialect)
    assert any(row.fp4_parameters for row in receipt.components if row.name.startswith(component))


def test_a_journal_without_checksums_is_not_believed(tiny_omni: Path, tmp_path: Path) -> None:
    entry = next(iter(open_checkpoint(tiny_omni).tensors.values()))
    with Staging(tmp_path / "out", {"job": 1}, resume=False) as staging:
        staging.record("copy:x", {})
        with OutputWriter(staging.folder, plan_output([])) as writer:
            assert check_finished(staging, [CopyUnit("copy:x", (entry,))], writer, 1) == 0
