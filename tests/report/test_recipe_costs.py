"""The table of benchmarks/recipe_costs.py: every figure comes from the receipts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import report_receipts

from omnifp4.receipt.base import Verdict
from omnifp4.receipt.evaluation import Gate
from omnifp4.report.gathering import gather


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "recipe_costs.py"
    spec = importlib.util.spec_from_file_location("recipe_costs", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def found(script: ModuleType, receipts: dict[str, Path]) -> dict[str, Any]:
    made = gather([receipts["quantization"]]).quantization
    proof = gather([receipts["verification"]]).verification
    gate = Gate(option="--max-accuracy-loss", limit=0.01, value=0.02, where="spoken digit", verdict=Verdict.FAIL)
    cost = report_receipts.evaluation().model_copy(update={"gates": (gate,)})
    return {name: script.Way(made, proof, cost) for name in script.WAYS}


def test_each_figure_has_a_row_and_each_way_a_column(script: ModuleType, found: dict[str, Any]) -> None:
    lines = list(script.table(found))
    assert {line.count("|") for line in lines} == {len(script.WAYS) + 3}
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert rows["KL, audio"] == ["floor 2.00e-5", *["0.0310"] * 5]
    assert rows["same likeliest token, text"] == ["floor 99.0 %", *["97.3 %"] * 5]
    assert rows["perplexity over BF16's, text"] == ["7.9", *["1.010"] * 5]
    assert rows["spoken digit (300)"] == ["98.0 %", *["-1.0 (4/1)"] * 5]
    assert rows["speech codes equal"] == ["floor 97.0 %", *["81.0 %"] * 5]
    assert rows["spoken answer understood (40)"] == ["95.0 %", *["-1.0"] * 5]
    assert rows["weights on disk"][1] == "8.17 MB"


def test_the_page_tells_whether_the_limit_is_kept(script: ModuleType, found: dict[str, Any]) -> None:
    page = script.page(found, "python benchmarks/recipe_costs.py")
    assert "loses in any task: 2.0 points (spoken digit); limit 1 point: fail." in page
    assert set(script.PICTURES.values()) | set(script.MAP_PICTURES.values()) == {
        line.partition("(images/")[2].rstrip(")") for line in page.splitlines() if "(images/" in line
    }
    assert "/home/somebody" not in page
