"""Error of the weights, layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from statistics import median
from typing import Final

from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.receipt.quantization import CalibrationUse
from omnifp4.report.figures import figure
from omnifp4.report.gathering import folder_name
from omnifp4.report.plots.layers import LayerPoint, LayerStrip, layers_plot
from omnifp4.report.sections.base import Figure, Section, Table

TITLE = "Error of the weights"
PLACE: Final = re.compile(r"(?P<stem>.*?)\.?(?:layers|blocks|layer|h)\.(?P<layer>\d{1,6})\.(?P<rest>.+)")
KINDS: Final = (
    ("shared_expert", "shared expert"),
    ("experts", "experts"),
    ("attn", "attention"),
    ("attention", "attention"),
    ("mlp", "MLP"),
)
MOST_STRIPS: Final = 8


def weights_section(receipt: GatheredReceipt) -> Section:
    """Relative squared error as quantize measured it, or the worst that verify found."""
    made = receipt.quantization
    if made is None or not made.decisions:
        return Section("weights", TITLE, missing="omnifp4 quantize MODEL OUT, and give OUT to omnifp4 report")
    lead = (
        f"Relative squared error {figure(made.relative_squared_error)} over {len(made.decisions):,} linears, "
        f"scale rule {made.rule}."
    )
    strips = layer_strips(made.decisions)
    figures: tuple[Figure, ...] = ()
    if strips:
        caption = "Relative squared error by layer: the median of the layer's linears, and the range they lie in."
        figures = (Figure(caption, lambda key, width: layers_plot(strips, key=key, width=width)),)
    table = Table(
        "Error by component",
        ("component", "linears", "relative squared error", "worst linear", "its error"),
        tuple(
            (
                name,
                f"{error.linears:,}",
                figure(error.relative_squared_error),
                error.worst_tensor,
                figure(error.worst_relative_squared_error),
            )
            for name, error in made.errors.items()
        ),
        numeric=frozenset({1, 2, 4}),
    )
    notes = [
        "sum((w - w')²) / sum(w²) of the decoded weights. It says how near the weights are, not what answers cost."
    ]
    tables = [table]
    if (seen := made.calibration) is not None:
        tables.append(_outputs_table(seen))
        notes.append(
            f"Calibrated with {seen.samples:,} samples, {seen.tokens:,} tokens of {folder_name(seen.data)} (SHA-256 {seen.data_sha256[:12]}), "
            f"{seen.activations}. Errors of outputs are shares of their energy on these inputs, and say nothing of others."
        )
    return Section("weights", TITLE, lead, figures, tuple(tables), tuple(notes))


def _outputs_table(seen: CalibrationUse) -> Table:
    return Table(
        "Error of outputs on the calibration inputs",
        ("component", "linears", "as written", "data-free rounding of the same weights"),
        tuple(
            (name, f"{item.linears:,}", figure(item.error), figure(item.data_free))
            for name, item in seen.outputs.items()
        ),
        numeric=frozenset({1, 2, 3}),
        brief=(0, 2, 3),
    )


def layer_strips(errors: Mapping[str, float]) -> tuple[LayerStrip, ...]:
    """Errors by linear, put together by kind and layer; what is in no layer, or not finite, is left out."""
    kinds: dict[str, dict[int, list[float]]] = {}
    for name, error in errors.items():
        match = PLACE.match(name)
        if match and math.isfinite(error):
            strip = kinds.setdefault(_kind(match["stem"], match["rest"]), {})
            strip.setdefault(int(match["layer"]), []).append(error)
    strips = [
        LayerStrip(
            kind,
            tuple(
                LayerPoint(layer, median(values), min(values), max(values)) for layer, values in sorted(layers.items())
            ),
        )
        for kind, layers in kinds.items()
    ]
    return tuple(strips[:MOST_STRIPS])


def _kind(stem: str, rest: str) -> str:
    part = " ".join(piece for piece in stem.split(".") if piece not in ("model", "encoder", "language_model"))
    kind = next((title for mark, title in KINDS if mark in rest), rest.split(".")[0])
    return f"{part.replace('_', ' ')} {kind}".strip()
