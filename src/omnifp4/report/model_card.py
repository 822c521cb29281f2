"""The model card of an artifact: what was done and what was measured, rendered from the receipt."""

from __future__ import annotations

from omnifp4.receipt.quantization import QuantizationReceipt

RULES = {
    "max": "the largest value of a block becomes 6",
    "four-over-six": "the largest value of a block becomes 6 or 4, whichever errs less",
    "sweep": "of eleven block scales the one of least squared error",
}


def model_card(receipt: QuantizationReceipt) -> str:
    """Markdown with the front matter of the Hub."""
    wide = receipt.output_format == "fake-quant"
    saved = receipt.source.weight_bytes / receipt.weight_bytes
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- nvfp4",
        "- fp4",
        "- omnifp4",
        f"- {receipt.source.model_type}",
        f"base_model: {receipt.source.model}",
        "base_model_relation: quantized",
        "---",
        "",
        f"# {receipt.source.model} in {'fake-quant NVFP4' if wide else 'NVFP4'}",
        "",
        f"Made by omnifp4 {receipt.environment.omnifp4} with recipe `{receipt.recipe}` (version {receipt.recipe_version}), "
        f"format `{receipt.output_format}`, scale rule `{receipt.rule}` ({RULES[receipt.rule]}). Weights only (W4A16); no "
        "data was used.",
        "",
    ]
    if wide:
        lines += [
            "**The weights are rounded through NVFP4 and stored wide: nothing shrinks. For quality checks only.**",
            "",
        ]
    lines += [
        f"{receipt.weight_bytes:,} bytes of weights in place of {receipt.source.weight_bytes:,} ({saved:.2f}x smaller); "
        f"{receipt.fp4_parameters / receipt.parameters:.1%} of {receipt.parameters:,} parameters are in FP4.",
        "",
        "| component | scheme | parameters | bytes before | bytes after | relative squared error | why it stays wide |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in receipt.components:
        error = receipt.errors.get(row.name)
        measured = f"{error.relative_squared_error:.2e}" if error else ""
        reason = row.reason.replace("|", "\\|")
        lines.append(
            f"| `{row.name}` | {row.scheme} | {row.parameters:,} | {row.bytes_before:,} | {row.bytes_after:,} | {measured} "
            f"| {reason} |"
        )
    lines += [
        "",
        "Relative squared error is `sum((w - w')^2) / sum(w^2)` of the decoded weights, measured while they were written. "
        "What it costs in answers was not measured here.",
        "",
        "Every decision, error and checksum is in `omnifp4.json`. To check this folder: `omnifp4 verify .`, and against "
        "the original weights: `omnifp4 verify . --against ORIGINAL`.",
        "",
    ]
    return "\n".join(lines)
