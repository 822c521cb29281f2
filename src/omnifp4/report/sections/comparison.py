"""Which of several artifacts is worth it: each against the baseline, sample by sample."""

from __future__ import annotations

from omnifp4.receipt.comparison import ComparisonReceipt
from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.figures import figure, size_text
from omnifp4.report.gathering import folder_name
from omnifp4.report.sections.base import TO, Section, Table
from omnifp4.report.sections.quality import interval

TITLE = "Which artifact is worth it"


def comparison_sections(receipt: GatheredReceipt) -> tuple[Section, ...]:
    """None where no artifacts were compared: most reports tell of one."""
    found = receipt.comparison
    if found is None:
        return ()
    baseline = folder_name(found.baseline)
    notes = (
        f"{found.samples:,} samples of {folder_name(found.data)} (SHA-256 {found.data_sha256[:12]}), {found.dtype} on "
        f"{found.device}. Differences are to {baseline}, of pairs of samples, with intervals of 95\u00a0% ({found.resamples:,} "
        "resamples). Nearer and worse: the interval leaves zero out and the difference is larger than the noise floor.",
        *found.notes,
    )
    lead = found.worth[:1].upper() + found.worth[1:] + "."
    tables = tuple(table for table in (_artifacts(found), _divergence(found), _answers(found)) if table.rows)
    return (Section("comparison", TITLE, lead, (), tables, notes),)


def _artifacts(found: ComparisonReceipt) -> Table:
    return Table(
        "Artifacts, their size and what each is worth",
        ("artifact", "recipe", "scale rule", "weights", "bits a weight", "bytes", "conclusion"),
        tuple(
            (
                folder_name(one.model),
                one.recipe,
                one.rule,
                size_text(one.weight_bytes),
                f"{one.bits_per_weight:.2f}",
                "baseline" if one.finding is None else f"{100 * one.more_bytes:+.1f}\u00a0%",
                one.conclusion,
            )
            for one in found.artifacts
        ),
        numeric=frozenset({3, 4, 5}),
        brief=(0, 3, 6),
    )


def _divergence(found: ComparisonReceipt) -> Table:
    return Table(
        f"Mean KL divergence from the reference, less that of {folder_name(found.baseline)}",
        ("artifact", "KL", "baseline's KL", "difference (95\u00a0%)", "times (95\u00a0%)", "noise floor", "finding"),
        tuple(
            (
                f"{item.modality} · {folder_name(one.model)}",
                figure(item.kl),
                figure(item.baseline_kl),
                interval(item.kl_difference),
                f"{item.kl_times.value:.2f} ({item.kl_times.low:.2f}{TO}{item.kl_times.high:.2f})"
                if item.kl_times
                else "no ratio",
                figure(item.floor) if item.floor is not None else "not measured",
                item.finding.value,
            )
            for one in found.artifacts
            for item in one.modalities
        ),
        numeric=frozenset(range(1, 6)),
        brief=(0, 3, 6),
    )


def _answers(found: ComparisonReceipt) -> Table:
    return Table(
        f"Right answers, less those of {folder_name(found.baseline)}, in points",
        ("task", "samples", "difference in points (95\u00a0%)", "lost", "gained", "finding"),
        tuple(
            (
                f"{item.task} · {folder_name(one.model)}",
                f"{item.samples:,}",
                f"{100 * item.difference.value:+.2f} ({100 * item.difference.low:+.2f}{TO}{100 * item.difference.high:+.2f})",
                f"{item.lost:,}",
                f"{item.gained:,}",
                item.finding.value,
            )
            for one in found.artifacts
            for item in one.tasks
        ),
        numeric=frozenset(range(1, 5)),
        folded=True,
    )
