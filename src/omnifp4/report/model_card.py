"""The model card of an artifact: what was done and what was measured, rendered from the receipt."""

from __future__ import annotations

import json
import re
from pathlib import PurePath

from omnifp4.receipt.quantization import QuantizationReceipt
from omnifp4.report.schemes import quantized_parameters, scheme_names

RULES = {
    "max": "the largest value of a block becomes 6",
    "four-over-six": "the largest value of a block becomes 6 or 4, whichever errs less",
    "sweep": "of eleven block scales the one of least squared error",
}


MEASURED_BEGIN = "<!-- omnifp4: measured -->"
MEASURED_END = "<!-- omnifp4: end -->"
"""Marks around what `omnifp4 report --card` replaces."""

MOST_LEFT_OUT = 20
"""Linears listed by name; the receipt has all."""


def model_card(receipt: QuantizationReceipt) -> str:
    """Markdown with the front matter of the Hub."""
    wide = receipt.output_format == "fake-quant"
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", receipt.source.model) is not None
    # The Hub takes nothing but one of its own ids for a base model.
    base_model = [f"base_model: {json.dumps(receipt.source.model)}", "base_model_relation: quantized"]
    title = " ".join(receipt.source.model.split())
    schemes = scheme_names(receipt)
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        *(f"- {scheme.lower()}" for scheme in schemes.split(" and ")),
        *(["- fp4"] if "FP4" in schemes else []),
        "- omnifp4",
        f"- {receipt.source.model_type}",
        *(base_model if is_hub_id else ()),
        "---",
        "",
        f"# {title} in {'fake-quant ' if wide else ''}{schemes}",
        "",
        f"Made by omnifp4 {receipt.environment.omnifp4} with recipe `{receipt.recipe}` (version {receipt.recipe_version}), "
        f"format `{receipt.output_format}`, scale rule `{receipt.rule}`{_rule(receipt.rule)}. {_data(receipt)}",
        "",
    ]
    if wide:
        lines += [
            f"**The weights are rounded through {schemes} and stored wide: nothing shrinks. For quality checks only.**",
            "",
        ]
    smaller = "" if wide else f" ({receipt.source.weight_bytes / receipt.weight_bytes:.2f}x smaller)"
    revision = f" at `{receipt.source.revision}`" if receipt.source.revision else ""
    lines += [
        f"{receipt.weight_bytes:,} bytes of weights in place of {receipt.source.weight_bytes:,}{smaller}; "
        f"{quantized_parameters(receipt) / receipt.parameters:.1%} of {receipt.parameters:,} parameters are "
        f"{'rounded to' if wide else 'in'} {schemes}. Source: `{title}`{revision}, config and headers "
        f"`{receipt.source.headers_sha256}`. It took {receipt.seconds:.0f} s on {receipt.threads} thread(s) and at most "
        f"{receipt.peak_memory_bytes / 1e9:.2f} GB of memory.",
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
    if receipt.left_out:
        lines += ["", "Linears of quantized components that stay wide:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in list(receipt.left_out.items())[:MOST_LEFT_OUT]]
        if len(receipt.left_out) > MOST_LEFT_OUT:
            lines.append(f"- and {len(receipt.left_out) - MOST_LEFT_OUT} more, see `omnifp4.json`")
    lines += [
        "",
        "Relative squared error is `sum((w - w')^2) / sum(w^2)` of the decoded weights, measured while they were written.",
        "",
        MEASURED_BEGIN,
        "",
        "What it costs in answers was not measured here.",
        "",
        MEASURED_END,
        "",
        "Every decision, error and checksum is in `omnifp4.json`. To check this folder: `omnifp4 verify .`, and against "
        "the original weights: `omnifp4 verify . --against ORIGINAL`.",
        "",
    ]
    return "\n".join(lines)


def _rule(rule: str) -> str:
    """What a scale rule does, where it has a sentence here."""
    return f" ({RULES[rule]})" if rule in RULES else ""


def _data(receipt: QuantizationReceipt) -> str:
    """What becomes of activations, and what data was used."""
    seen = receipt.calibration
    if seen is None:
        return "Weights only: activations stay wide, and no data was used."
    data = " ".join(PurePath(seen.data).name.split())
    return (
        f"{seen.activations}. Calibrated with {seen.samples:,} samples ({seen.tokens:,} tokens) of `{data}`, "
        f"SHA-256 `{seen.data_sha256}`."
    )
