"""Whether FP4 is where it is claimed to be, and nowhere else: what really shrank."""

from __future__ import annotations

from collections import Counter
from typing import Final

from omnifp4.checkpoint.dtypes import DTYPE_BITS
from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.formats.scheme import Scheme
from omnifp4.verification.findings import Findings
from omnifp4.verification.subject import READABLE_KINDS, Subject, is_readable
from omnifp4.verification.taking import Taking

SMALLEST_RATIO: Final = 1.005
"""Below this it shows as 1.00x."""

RATIO_TOLERANCE: Final = 0.01
"""How far the size may be above what the config promises: headers, and scales that other tools add."""

SCALE_BYTES: Final = 8
"""Tensor scale and input scale of one linear."""

AGAIN: Final = "quantize again: omnifp4 quantize MODEL OUT"


def check_present(subject: Subject, taking: Taking) -> Findings:
    """``fp4.present``: what the config says is FP4 has codes, not wide weights."""
    found = Findings("fp4.present", "FP4 tensors are where the config says", fix=AGAIN)
    total = len(subject.linear_specs)
    found.passed = f"{len(subject.fp4):,} of {total:,} linears are FP4"
    for scheme, count in subject.linears_by_scheme.items():
        if scheme != Scheme.NVFP4.value:
            found.passed += f", {count:,} {scheme.upper()}"
    if not subject.quantized:
        parts = sum(spec.parameters for spec in subject.linear_specs.values())
        said = "though the config claims a quantization" if subject.claims else "and the config claims nothing else"
        found.failed = f"1.00x: nothing is quantized, {said}"
        found.add(f"all {total:,} linears ({parts:,} parameters) are stored wide", max(1, total))
        statistics = sum(name.endswith("_amax") for name in subject.checkpoint.tensors)
        if statistics:
            found.add(f"{statistics:,} _amax statistics lie beside them: calibrated, never packed")
        if (subject.folder / "vllm_fq_modelopt_state.pth").exists():
            found.add("vllm_fq_modelopt_state.pth: a fake-quant export of ModelOpt, made for quality checks")
        return found
    wide = taking.claimed_but_wide
    for module in wide:
        entry = subject.checkpoint.tensors.get(f"{module}.weight")
        found.add(
            f"{module}: the config says FP4, its weight is {entry.dtype if entry is not None else 'fused and wide'}"
        )
    if wide:
        found.failed = f"{len(wide):,} linears that the config says are FP4 are stored wide"
    return found


def check_coverage(subject: Subject) -> Findings:
    """``fp4.coverage``: only what engines read quantized, and what survives it, was quantized."""
    found = Findings(
        "fp4.coverage",
        "nothing is FP4 that engines build wide",
        fix="quantize again with an ignore list, or: omnifp4 repair IN OUT --source WIDE",
    )
    if not subject.quantized:
        found.unchecked = "no tensor is FP4"
        return found
    asked: Counter[str] = Counter()
    outside: dict[str, list[str]] = {}
    for module in subject.quantized:
        spec = subject.layout.by_name.get(f"{module}.weight")
        if spec is None or is_readable(spec):
            continue
        name = spec.component.name
        if name in subject.asked_components:
            asked[name] += 1
        else:
            outside.setdefault(name, []).append(module)
    for name, modules in outside.items():
        spec = subject.layout.by_name[f"{modules[0]}.weight"]
        found.add(f"{name}: {len(modules):,} FP4, as {modules[0]} ({spec.component.why_wide})", len(modules))
    if outside:
        found.failed = f"{found.count:,} linears of {', '.join(outside)} are FP4: engines build them wide and cannot load the codes"
    kinds = ", ".join(sorted(kind.value.replace("_", " ") for kind in READABLE_KINDS))
    found.passed = f"FP4 is only in {kinds}"
    if asked:
        found.notes.append(f"FP4 as its recipe asked, though engines may build them wide: {', '.join(asked)}")
    return found


def check_ratio(subject: Subject, taking: Taking) -> Findings:
    """``fp4.ratio``: the size is what the config, or our own plan, promises."""
    found = Findings("fp4.ratio", "the size is what was promised", fix=AGAIN)
    checkpoint = subject.checkpoint
    stored, wide, ratio = checkpoint.weight_bytes, subject.wide_equivalent_bytes, subject.compression_ratio
    headers = stored - sum(entry.nbytes for entry in checkpoint.tensors.values())
    found.passed = f"{ratio:.2f}x: {_size(stored)} instead of {_size(wide)}"
    found.failed = f"{ratio:.2f}x, {_size(stored)}"
    if ratio < SMALLEST_RATIO:
        found.add(f"{ratio:.2f}x: {stored:,} bytes where the wide checkpoint has {wide:,}: nothing shrank")
    promised = (subject.receipt or {}).get("weight_bytes")
    if isinstance(promised, int) and not isinstance(promised, bool):
        if promised != stored:
            found.add(f"omnifp4.json says {promised:,} bytes of weights, the shards have {stored:,}")
        return found
    if taking.taken:
        expected = headers + _expected_bytes(subject, taking)
        if stored > expected * (1 + RATIO_TOLERANCE):
            found.add(f"{stored:,} bytes where the config's FP4 linears would leave {expected:,}")
    return found


def _expected_bytes(subject: Subject, taking: Taking) -> int:
    """Bytes of all tensors if every linear that the config says is FP4 were."""
    claimed, coded = set(taking.claimed_but_wide), subject.coded
    total = 0
    for spec in subject.layout.tensors:
        if spec.is_linear and spec.module in coded:
            total += sum(entry.nbytes for entry in coded[spec.module].entries)
        elif spec.is_linear and (spec.module in subject.fp4 or spec.module in claimed):
            total += spec.parameters // 2 + spec.parameters // BLOCK_SIZE + SCALE_BYTES
        else:
            entry = subject.checkpoint.tensors.get(spec.name)
            total += spec.parameters * (DTYPE_BITS[entry.dtype] if entry is not None else 16) // 8
    return total


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
