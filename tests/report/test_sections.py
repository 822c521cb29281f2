"""What sections say of receipts: comparisons, gates, noise, schemes, calibration."""

from __future__ import annotations

from pathlib import Path

import pytest
import report_receipts

import omnifp4
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.evaluation import Gate
from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.receipt.quantization import CalibrationUse, OutputError, QuantizationReceipt
from omnifp4.report.contents import sections
from omnifp4.report.gathering import gather
from omnifp4.report.model_card import model_card
from omnifp4.report.page import html_page
from omnifp4.report.schemes import headline, scheme_names
from omnifp4.report.sections.base import Section, Table
from omnifp4.report.sections.quality import change_rows, divergence_rows, labels_of, quality_section
from omnifp4.report.sections.sensitivity import grids, sensitivity_section_of
from omnifp4.report.sections.weights import weights_section


def table(section: Section, caption: str) -> Table:
    return next(item for item in section.tables if item.caption.startswith(caption))


def test_one_evaluation_has_no_groups_and_several_have_one_for_each_figure() -> None:
    one = (report_receipts.evaluation("/x/sweep"),)
    assert [(row.name, row.group) for row in divergence_rows(one, labels_of(one))] == [
        ("text", ""), ("image", ""), ("audio", ""),
    ]  # fmt: skip
    assert [(row.name, row.value, row.floor) for row in change_rows(one, labels_of(one))] == [
        ("spoken digit", -1.0, 0.0), ("spoken answer", -1.0, pytest.approx(0)),
    ]  # fmt: skip
    several = (*one, report_receipts.evaluation("/x/max"))
    rows = divergence_rows(several, labels_of(several))
    assert [(row.group, row.name) for row in rows[:3]] == [("text", "sweep"), ("text", "max"), ("image", "sweep")]
    changes = change_rows(several, labels_of(several))
    assert [(row.group.replace("\u00a0", " "), row.name) for row in changes] == [
        ("spoken digit, 98.00 % of 300 before", "sweep"), ("spoken digit, 98.00 % of 300 before", "max"),
        ("spoken answer, 95.00 % of 40 before", "sweep"), ("spoken answer, 95.00 % of 40 before", "max"),
    ]  # fmt: skip


def gathered(*gates: Gate) -> GatheredReceipt:
    return omnifp4.write_report([report_receipts.evaluation().model_copy(update={"gates": gates})])


def test_gates_are_counted_and_the_failed_ones_named() -> None:
    kept = Gate(option="--max-kl", limit=0.05, value=0.03, where="audio", verdict=Verdict.PASS)
    broken = Gate(option="--min-top1", limit=0.99, value=0.96, where="text", verdict=Verdict.FAIL)
    assert "gates" not in quality_section(gathered()).lead
    assert quality_section(gathered(kept)).lead.endswith(" 1 of 1 gates pass.")
    section = quality_section(gathered(kept, broken))
    assert section.lead.endswith(" 1 of 2 gates pass; --min-top1 failed.")
    gates = table(section, "Gates")
    assert gates.states == ("pass", "fail")
    assert gates.rows[1] == ("--min-top1", "tiny-omni-nvfp4", "0.99", "0.960", "text", "fail")


def test_what_is_not_finite_has_a_column_only_where_there_is_something() -> None:
    evaluation = report_receipts.evaluation()
    assert "not finite" not in table(quality_section(omnifp4.write_report([evaluation])), "Divergence").columns
    first = evaluation.modalities[0]
    bad = first.model_copy(update={"model": first.model.model_copy(update={"non_finite": 7})})
    broken = evaluation.model_copy(update={"modalities": (bad, *evaluation.modalities[1:])})
    found = table(quality_section(omnifp4.write_report([broken])), "Divergence")
    assert found.columns[-1] == "not finite"
    assert [row[-1] for row in found.rows] == ["7", "0", "0"]
    assert len(found.columns) == len(found.rows[0])


def test_the_noise_floor_of_speech_stands_beside_it() -> None:
    section = quality_section(omnifp4.write_report([report_receipts.evaluation()]))
    assert [row[0] for row in table(section, "Speech out").rows] == ["tiny-omni-nvfp4", "noise floor"]
    drift = table(section, "Drift")
    assert "longest utterances (9)" in drift.caption
    assert [row[0] for row in drift.rows] == ["tiny-omni-nvfp4", "noise floor"]


def test_what_does_not_reach_the_noise_floor_has_no_share() -> None:
    found = report_receipts.sensitivity()
    section = sensitivity_section_of(found)
    assert section.notes[1] == "Every part is above the noise floor of 1.00e-5."
    assert [row[-1].replace("\u00a0", " ") for row in table(section, "Components").rows] == ["40.00 %", "40.00 %"]
    noisy = sensitivity_section_of(found.model_copy(update={"noise_floor": 0.03}))
    assert noisy.notes[1].startswith("11 of 12 parts cost no more alone than the noise floor of 0.0300")
    assert noisy.notes[1].endswith("--dtype float32 lowers it.")
    assert [row[-1].replace("\u00a0", " ") for row in table(noisy, "Components").rows] == ["40.00 %", "in the noise"]


def test_experts_that_were_run_alone_get_a_grid_of_their_own() -> None:
    found = report_receipts.sensitivity()
    titles = [grid.title for grid in grids(found)]
    assert len(titles) == 3
    rows = tuple(
        row.model_copy(update={"kl_mean": report_receipts.estimate(1e-4), "share": 0.1})
        if row.expert is not None and row.tokens
        else row
        for row in found.rows
    )
    with_experts = found.model_copy(update={"rows": rows})
    added = [grid for grid in grids(with_experts) if grid.title not in titles]
    assert [grid.title for grid in added] == ["KL divergence of each expert of thinker.experts, quantized alone"]
    assert added[0].values[0] == (1e-4, 1e-4, 1e-4, None, 1e-4, 1e-4, 1e-4, 1e-4)
    experts = table(sensitivity_section_of(with_experts), "Experts")
    assert {row[6] for row in experts.rows} == {"1.00e-4", "not measured"}


@pytest.fixture(scope="module")
def made(tiny_artifact: Path) -> QuantizationReceipt:
    found = gather([tiny_artifact]).quantization
    assert found is not None
    return found


def test_schemes_are_named_after_what_is_there(made: QuantizationReceipt) -> None:
    assert scheme_names(made) == "NVFP4"
    assert scheme_names(None) == "NVFP4"
    mixed = made.model_copy(update={"schemes": {next(iter(made.decisions)): "fp8"}})
    assert scheme_names(mixed) == "NVFP4 and FP8"
    report = omnifp4.write_report([mixed])
    assert headline(report) == "tiny-omni in NVFP4 and FP8"
    assert "<h1>tiny-omni in NVFP4 and FP8</h1>" in html_page(report)
    card = model_card(mixed)
    assert "# tiny-omni in NVFP4 and FP8\n" in card
    assert "- nvfp4\n- fp8\n- fp4\n" in card


def test_calibration_is_told_on_the_page_and_in_the_card(made: QuantizationReceipt) -> None:
    assert "no data was used" in model_card(made)
    use = CalibrationUse(
        method={}, weighting="activations", activations="W4A16", data="my set", data_sha256="cd" * 32, samples=128,
        tokens=65_536, sources={}, data_free=(), folds=0, fold_places=0, more_damped=0, not_inverted=0,
        sibling_scales=0, outputs={"thinker.experts": OutputError(linears=96, error=0.004, data_free=0.0069)},
    )  # fmt: skip
    seen = made.model_copy(update={"calibration": use})
    card = model_card(seen)
    assert "no data was used" not in card
    assert "Calibrated with 128 samples (65,536 tokens) of `my set`" in card
    section = weights_section(omnifp4.write_report([seen]))
    assert table(section, "Error of outputs").rows == (("thinker.experts", "96", "0.00400", "0.00690"),)
    assert "128 samples" in section.notes[1]
    assert len(weights_section(omnifp4.write_report([made])).tables) == 1


def test_calibration_has_a_section_only_where_there_was_one() -> None:
    assert "calibration" not in [section.key for section in sections(gathered())]
    report = omnifp4.write_report([report_receipts.calibration()])
    section = next(item for item in sections(report) if item.key == "calibration")
    assert section.lead == "126 of 128 samples of bundled went through; tokens: 9,000 text, 1,234 audio."
    experts = table(section, "Tokens of the experts")
    assert experts.rows[1] == ("thinker.model.layers.1.mlp.experts", "0", "34", "2,000", "1", "2", "0")
    assert table(section, "Samples that failed").rows == (("missing or damaged media", "2", "line 9", "no file a.wav"),)
    assert "audio_tower has no statistics: stays wide" in section.notes
    drawing = section.figures[0].draw("k", 900)
    assert "Largest: 0, expert 2: 2,000" in drawing.description.replace("1, expert 2: 2,000; ", "")


def test_where_things_lie_is_not_told(tiny_artifact: Path, receipts: dict[str, Path]) -> None:
    proof = gather([receipts["verification"]]).verification
    assert proof is not None
    assert proof.artifact == str(tiny_artifact)
    check = proof.checks[0].model_copy(
        update={
            "verdict": Verdict.FAIL,
            "findings": (f"{tiny_artifact}/config.json is bad",),
            "fix": f"omnifp4 repair {tiny_artifact} MENDED",
        }
    )
    records = [
        proof.model_copy(update={"checks": (check,), "verdict": Verdict.FAIL}),
        report_receipts.evaluation().model_copy(update={"data": "/home/somebody/set.jsonl"}),
        report_receipts.sensitivity().model_copy(update={"data": "/home/somebody/set.jsonl"}),
        report_receipts.calibration().model_copy(update={"data": "/home/somebody/set"}),
    ]
    text = html_page(omnifp4.write_report(records))
    assert "fix: omnifp4 repair tiny-omni-nvfp4 MENDED" in text
    assert text.count("set.jsonl") == 2
    assert "/home/somebody" not in text
    assert str(tiny_artifact.parent) not in text


def test_small_numbers_are_not_broken_and_intervals_go_below() -> None:
    text = html_page(omnifp4.write_report([report_receipts.evaluation(), report_receipts.sensitivity()]))
    assert '<span class="whole">1.00e-5</span>' in text
    assert '<td class="n">0.0310<br>(0.0279\u00a0to\u00a00.0341)</td>' in text
