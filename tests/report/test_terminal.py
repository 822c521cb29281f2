"""Receipts as text."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

import omnifp4
from omnifp4.receipt.base import Verdict, this_environment
from omnifp4.receipt.verification import Check, TensorError, VerificationReceipt
from omnifp4.report.figures import count_text, size_text
from omnifp4.report.model_card import MOST_LEFT_OUT, model_card
from omnifp4.report.terminal import plan_text, quantization_text, verification_text


def rendered(shown: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (27_546_000_000, "27.5 GB"), (70_519_637_090, "70.5 GB"),
        (999_600, "1 MB"), (123_456_789, "123 MB"), (5 * 10**15, "5000 TB"),
    ],
)  # fmt: skip
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (1664, "1,664"), (393_216, "0.39 M"), (28_991_029_248, "28,991 M")]
)
def test_counts(count: int, text: str) -> None:
    assert count_text(count) == text


def test_a_plan_fits_80_columns_and_gives_every_reason_once(tiny_omni: Path) -> None:
    plan = omnifp4.plan(tiny_omni, out=tiny_omni)
    text = rendered(plan_text(plan))
    table = text.partition("What stays wide")[0].splitlines()
    assert max(map(len, table)) <= 80
    for row in plan.components:
        assert row.name in text
        if row.reason:
            assert text.count(row.reason) == 1
    assert f"{plan.weight_bytes_after:,} bytes of weights in 1 shard(s): 1.34x smaller" in text
    assert f"free disk {plan.free_disk_bytes:,} bytes: enough" in text


def test_too_little_disk_and_left_out_linears_are_told(tiny_omni: Path) -> None:
    plan = omnifp4.plan(tiny_omni).model_copy(
        update={"free_disk_bytes": 8_000_000, "left_out": {"a.weight": "width 72", "b.weight": "width 72"}}
    )
    text = rendered(plan_text(plan))
    assert "free disk 8,000,000 bytes: TOO LITTLE" in text
    assert "2 linear(s) of FP4 components stay wide, such as a.weight: width 72" in text


def test_names_are_not_markup(tiny_omni: Path) -> None:
    plan = omnifp4.plan(tiny_omni).model_copy(update={"model": "[red]x[/blue]"})
    assert "[red]x[/blue]" in rendered(plan_text(plan))


def proof(**changes: object) -> VerificationReceipt:
    checks = (
        Check(name="shards", title="shards are whole", verdict=Verdict.PASS, summary="1 shard"),
        Check(
            name="scales.finite", title="scales", verdict=Verdict.FAIL, summary="12 [bad]", fix="omnifp4 repair",
            findings=tuple(f"finding {number}" for number in range(12)), finding_count=12,
        ),
        Check(name="values", title="values", verdict=Verdict.NOT_CHECKED, summary="no --against"),
    )  # fmt: skip
    receipt = VerificationReceipt(
        artifact="[x", against=None, dialect="modelopt", model_type="llama", activations="W4A16", verdict=Verdict.FAIL,
        checks=checks, fp4_linears=3, fp4_parameters=1, wide_parameters=1, weight_bytes=1, wide_equivalent_bytes=2,
        compression_ratio=2.0, seconds=0.1, environment=this_environment(), relative_squared_error=6.6e-3,
        worst_tensors=(TensorError(name="w", relative_squared_error=0.5, max_abs_error=1.0),),
    )  # fmt: skip
    return receipt.model_copy(update=changes)


def test_a_proof_shows_verdicts_findings_and_fixes() -> None:
    text = rendered(verification_text(proof()))
    assert "[x: modelopt, W4A16" in text
    for word in (
        "12 [bad]",
        "finding 7",
        "4 more",
        "fix: omnifp4 repair",
        "not checked",
        "2.00x smaller",
        "w 5.00e-01",
    ):
        assert word in text
    assert "finding 8" not in text
    assert text.rstrip().endswith("FAIL")


def test_what_quantize_tells(tiny_omni: Path, tmp_path: Path) -> None:
    receipt = omnifp4.quantize(tiny_omni, tmp_path / "out")
    text = rendered(quantization_text(receipt, "[OUT"))
    assert text.startswith("[OUT: 8.17 MB of weights in place of 11 MB (1.34x smaller), 36.0% of parameters in FP4")
    assert "over 112 linears" in text
    assert "stay wide" not in text
    fake = receipt.model_copy(update={"output_format": "fake-quant", "left_out": {"a.weight": "width 72"}})
    text = rendered(quantization_text(fake, "OUT"))
    assert "nothing shrinks" in text
    assert "smaller" not in text
    assert "a.weight: width 72" in text


def test_a_card_s_front_matter_survives_any_name(tiny_omni: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    receipt = omnifp4.quantize(tiny_omni, tmp_path / "out")
    for model, base in (("a: b\n# c", None), ("Org/Model-1.5", "Org/Model-1.5"), ("[x]", None), ("../up/x", None)):
        left = {f"layer{number}.weight": "width 72" for number in range(MOST_LEFT_OUT + 3)}
        changed = receipt.model_copy(
            update={"source": receipt.source.model_copy(update={"model": model}), "left_out": left}
        )
        card = model_card(changed)
        _, front, body = card.split("---\n", 2)
        read = yaml.safe_load(front)
        assert read["tags"] == ["nvfp4", "fp4", "omnifp4", "qwen3_omni_moe"]
        assert read.get("base_model") == base
        assert body.startswith(f"\n# {' '.join(model.split())} in NVFP4\n\n")
        assert "and 3 more" in body
