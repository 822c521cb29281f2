"""The sections of a report in their order, and the figures that are read first."""

from __future__ import annotations

from omnifp4.receipt.base import Verdict
from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.figures import count_text, figure, size_text
from omnifp4.report.schemes import quantized_parameters, scheme_names
from omnifp4.report.sections.base import KeyFigure, Section, percent, ratio_text
from omnifp4.report.sections.calibration import calibration_sections
from omnifp4.report.sections.comparison import comparison_sections
from omnifp4.report.sections.fit import fit_section
from omnifp4.report.sections.proof import counts, proof_section
from omnifp4.report.sections.provenance import provenance_section
from omnifp4.report.sections.quality import quality_section, worst_modality
from omnifp4.report.sections.sensitivity import sensitivity_section
from omnifp4.report.sections.size import size_section, weight_bytes
from omnifp4.report.sections.speed import speed_figure, speed_section
from omnifp4.report.sections.weights import weights_section

NOT_MEASURED = "not measured"


def sections(receipt: GatheredReceipt) -> tuple[Section, ...]:
    """All sections, those that were not measured too."""
    return (
        proof_section(receipt),
        size_section(receipt),
        quality_section(receipt),
        *comparison_sections(receipt),
        sensitivity_section(receipt),
        weights_section(receipt),
        *calibration_sections(receipt),
        speed_section(receipt),
        fit_section(receipt),
        provenance_section(receipt),
    )


def key_figures(receipt: GatheredReceipt) -> tuple[KeyFigure, ...]:
    """One figure for each question: proven, how small, how true, how fast."""
    return (_proof(receipt), *_size(receipt), *_quality(receipt), speed_figure(receipt))


def _proof(receipt: GatheredReceipt) -> KeyFigure:
    proof = receipt.verification
    if proof is None:
        return KeyFigure("proof", NOT_MEASURED, "omnifp4 verify", "none")
    return KeyFigure("proof", proof.verdict.value, counts(proof), proof.verdict.value)


def _size(receipt: GatheredReceipt) -> tuple[KeyFigure, KeyFigure]:
    source = receipt.quantization or receipt.plan
    if source is None:
        return (
            KeyFigure("weights on disk", NOT_MEASURED, "omnifp4 plan", "none"),
            KeyFigure("parameters quantized", NOT_MEASURED, "omnifp4 plan", "none"),
        )
    before, after = weight_bytes(receipt)
    planned = "" if receipt.quantization else "planned, "
    share = quantized_parameters(source) / source.parameters if source.parameters else None
    return (
        KeyFigure(
            "weights on disk", size_text(after), f"{planned}from {size_text(before)}, {ratio_text(before, after)}"
        ),
        KeyFigure(f"parameters in {scheme_names(source)}", percent(share), f"of {count_text(source.parameters)}"),
    )


def _quality(receipt: GatheredReceipt) -> tuple[KeyFigure, KeyFigure]:
    measured = [(item, worst) for item in receipt.judged[:1] if (worst := worst_modality(item))]
    if not measured:
        return (
            KeyFigure("KL from the reference", NOT_MEASURED, "omnifp4 evaluate", "none"),
            KeyFigure("same likeliest token", NOT_MEASURED, "omnifp4 evaluate", "none"),
        )
    evaluation, (name, model, floor) = measured[0]
    state = Verdict.FAIL.value if evaluation.verdict is Verdict.FAIL else ""
    beside = f"noise floor {figure(floor.kl_mean.value)}" if floor else "no noise floor"
    least = min(evaluation.modalities, key=lambda item: item.model.top1_agreement.value)
    return (
        KeyFigure("mean KL, nats", figure(model.kl_mean.value), f"{name}, the worst modality; {beside}", state),
        KeyFigure(
            "same likeliest token",
            percent(least.model.top1_agreement.value),
            f"{least.modality}, the worst modality",
            state,
        ),
    )
