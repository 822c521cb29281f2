"""Bytes before and after, component by component."""

from __future__ import annotations

from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.receipt.plan import ComponentRow
from omnifp4.report.figures import count_text, size_text
from omnifp4.report.plots.sizes import SizeRow, sizes_plot
from omnifp4.report.schemes import quantized_parameters, scheme_names
from omnifp4.report.sections.base import Figure, Section, Table, percent, ratio_text

TITLE = "Size"


def size_section(receipt: GatheredReceipt) -> Section:
    """From the receipt of quantize, or from the plan where nothing was made yet."""
    source = receipt.quantization or receipt.plan
    if source is None:
        return Section("size", TITLE, missing="omnifp4 plan MODEL --json > plan.json")
    before, after = weight_bytes(receipt)
    done = "takes" if receipt.quantization else "would take"
    lead = f"{size_text(after)} {done} the place of {size_text(before)}: {ratio_text(before, after)}."
    if source.output_format == "fake-quant":
        lead = f"{size_text(after)}: the weights are rounded through {scheme_names(source)} and stored wide, nothing shrinks."
    if source.parameters:
        share = percent(quantized_parameters(source) / source.parameters)
        lead += f" {share} of {count_text(source.parameters)} parameters are in {scheme_names(source)}."
    rows = tuple(SizeRow(row.name, row.bytes_before, row.bytes_after) for row in source.components)
    notes = [f"{name} stays wide: {reason}" for name, reason in list(source.left_out.items())[:5]]
    if len(source.left_out) > 5:
        notes.append(f"{len(source.left_out) - 5:,} more linears of FP4 components stay wide; the receipt has them")
    figure = Figure(
        "Bytes of weights by component, before and after.", lambda key, width: sizes_plot(rows, key=key, width=width)
    )
    return Section("size", TITLE, lead, (figure,) if rows else (), (component_table(source.components),), tuple(notes))


def weight_bytes(receipt: GatheredReceipt) -> tuple[int, int]:
    """Bytes of all shard files, before and after; zeros if neither plan nor quantize was gathered."""
    if made := receipt.quantization:
        return made.source.weight_bytes, made.weight_bytes
    if plan := receipt.plan:
        return plan.weight_bytes_before, plan.weight_bytes_after
    return 0, 0


def component_table(components: tuple[ComponentRow, ...]) -> Table:
    """Every component with its bytes and the reason why it stays wide."""
    return Table(
        "Components",
        ("component", "stored as", "parameters", "before", "after", "why it stays wide"),
        tuple(
            (
                row.name,
                row.scheme,
                count_text(row.parameters),
                size_text(row.bytes_before),
                size_text(row.bytes_after),
                row.reason,
            )
            for row in components
        ),
        numeric=frozenset({2, 3, 4}),
        folded=True,
    )
