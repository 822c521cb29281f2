"""Where it fits: sizes of loaded parts against usual memory sizes."""

from __future__ import annotations

from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.figures import size_text
from omnifp4.report.sections.base import Section, Table

TITLE = "Where it fits"


def fit_section(receipt: GatheredReceipt) -> Section:
    """Tiers and contexts as doctor reckons them from headers."""
    doctor = receipt.doctor
    if doctor is None or doctor.fit is None:
        return Section("fit", TITLE, missing="omnifp4 doctor OUT --json > doctor.json")
    tiers = Table(
        "Tiers by loaded parts",
        ("loaded parts", "weights", "tier", "smallest device"),
        tuple(
            (
                row.loaded,
                size_text(row.weight_bytes),
                row.tier,
                f"{row.smallest_device_gb} GB" if row.smallest_device_gb else "none of the usual",
            )
            for row in doctor.fit.tiers
        ),
        numeric=frozenset({1, 3}),
    )
    rows = Table(
        "Longest context",
        ("loaded parts", "device", "free memory", "weights", "batch", "tokens for each", "memory then"),
        tuple(
            (
                row.loaded,
                row.device,
                size_text(row.device_bytes),
                size_text(row.weight_bytes),
                f"{row.batch:,}",
                f"{row.most_tokens:,}" if row.most_tokens else "does not fit",
                size_text(row.needed_bytes),
            )
            for row in doctor.fit.rows
        ),
        numeric=frozenset(range(2, 7)),
        folded=True,
    )
    tables = tuple(table for table in (tiers, rows) if table.rows)
    return Section("fit", TITLE, "Reckoned from the headers, not measured.", tables=tables, notes=doctor.fit.rule)
