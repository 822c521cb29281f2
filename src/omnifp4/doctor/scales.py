"""A quick look at the tensor scales alone: a few bytes a linear, and yet most garbage shows in them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.doctor.facts import Facts
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.verification import Check

LEAST: Final = 1e-15
MOST: Final = 1e6
"""A tensor scale is the largest weight over 2688: what is far outside was never computed."""

SHOWN: Final = 8
GATE_OR_UP: Final = re.compile(r"^(?P<mlp>.*)\.(?P<which>gate|up)_proj$")


def check_scales(facts: Facts) -> Check:
    """``scales.sane``: tensor scales are finite, positive and plausible, and gate and up share theirs."""
    scales = read_tensor_scales(facts)
    findings = [
        f"{module}: its tensor scale is {value:.6g}"
        for module, value in scales.items()
        if not math.isfinite(value) or not LEAST <= value <= MOST
    ]
    pairs: dict[str, dict[str, float]] = {}
    for module, value in scales.items():
        if (match := GATE_OR_UP.match(module)) is not None:
            pairs.setdefault(match["mlp"], {})[match["which"]] = value
    findings += [
        f"{mlp}: gate has tensor scale {pair['gate']:.6g}, up {pair['up']:.6g}, but kernels take one for both"
        for mlp, pair in pairs.items()
        if len(pair) == 2 and pair["gate"] != pair["up"]
    ]
    return Check(
        name="scales.sane",
        title="tensor scales are sane, and shared where kernels fuse",
        verdict=Verdict.FAIL if findings else Verdict.PASS,
        summary=(
            f"{len(findings):,} tensor scales are wrong: {findings[0]}"
            if findings
            else f"{len(scales):,} tensor scales are finite and plausible"
        ),
        findings=tuple(findings[:SHOWN]),
        finding_count=len(findings),
        fix="omnifp4 repair IN OUT mends what can be mended; garbage must be quantized again" if findings else "",
    )


def read_tensor_scales(facts: Facts) -> Mapping[str, float]:
    """The tensor scale of each FP4 linear as a factor, by module; those without one are for other checks."""
    found: dict[str, float] = {}
    with CheckpointReader(facts.checkpoint) as reader, np.errstate(all="ignore"):
        for module, linear in facts.fp4.items():
            entry = linear.tensor_scale
            if entry is not None and entry.dtype == "F32" and entry.parameters == 1:
                value = np.float64(np.asarray(reader.read(entry)).reshape(-1)[0])
                found[module] = float(1.0 / value if linear.reciprocal else value)
    return found
