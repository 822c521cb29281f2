"""A whole set of receipts: those of plan, quantize, verify and doctor from real runs, the rest made up."""

from __future__ import annotations

from pathlib import Path

import pytest
import report_receipts

import omnifp4
from omnifp4.doctor import run_doctor
from omnifp4.receipt.base import Record


@pytest.fixture(scope="session")
def receipts(tiny_omni: Path, tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by kind; the quantization is the artifact's folder."""
    folder = tmp_path_factory.mktemp("receipts")
    records: dict[str, Record] = {
        "plan": omnifp4.plan(tiny_omni),
        "verification": omnifp4.verify(tiny_artifact, against=tiny_omni, threads=2),
        "evaluation": report_receipts.evaluation(),
        "comparison": report_receipts.comparison(),
        "sensitivity": report_receipts.sensitivity(),
        "calibration": report_receipts.calibration(),
        "bench": report_receipts.bench(),
        "doctor": run_doctor(str(tiny_artifact)),
    }
    found = {"quantization": tiny_artifact}
    for name, record in records.items():
        found[name] = folder / f"{name}.json"
        found[name].write_text(record.model_dump_json(), encoding="utf-8")
    return found
