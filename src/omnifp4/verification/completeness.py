"""Whether every tensor that the config calls for is there, in the right type and shape, and no other."""

from __future__ import annotations

import re
from typing import Final

from omnifp4.checkpoint.dialects import CodedLinear, LinearEntries
from omnifp4.checkpoint.dtypes import WIDE_FLOATS
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.models import TensorSpec
from omnifp4.verification.findings import Findings
from omnifp4.verification.subject import SPEECH_PREFIXES, Subject

KV_SCALE: Final = re.compile(r"\.self_attn\.(?:[kvq]_proj\.)?(?:[kvq]|attn|kv_cache|prob)_scale$|\.[kvq]_scale$")
IN_MEMORY: Final = "model.language_model."
STATISTIC: Final = "_amax"


def check_tensors(subject: Subject) -> tuple[Findings, set[str]]:
    """``tensors.complete``, and the modules whose codes and scales are all of the right type and shape."""
    found = Findings(
        "tensors.complete",
        "every tensor is there, and none is unknown",
        fix="omnifp4 repair IN OUT --source WIDE recomputes missing or damaged tensors",
    )
    accounted: set[str] = set()
    present: set[str] = set()
    sound: set[str] = set()
    for module, linear in subject.fp4.items():
        parts = (linear.packed, linear.block_scale, linear.tensor_scale, linear.input_scale, *(linear.branch or ()))
        accounted.update(part.name for part in parts if part is not None)
        weight = f"{module}.weight"
        present.add(weight)
        spec = subject.layout.by_name.get(weight)
        if spec is None:
            found.add(f"{linear.packed.name}: FP4, but a {subject.layout.model_type} of this config has no such linear")
        elif not spec.is_linear:
            found.add(f"{linear.packed.name}: FP4, but it is no linear layer's weight, the only thing NVFP4 can hold")
        problems = _linear_problems(linear, spec)
        if not problems:
            sound.add(module)
        for problem in problems:
            found.add(problem)
    for module, coded in subject.coded.items():
        accounted.update(entry.name for entry in coded.entries)
        present.add(f"{module}.weight")
        problems = _coded_problems(coded, subject.layout.by_name.get(f"{module}.weight"), subject.layout.model_type)
        if not problems:
            sound.add(module)
        for problem in problems:
            found.add(problem)
    wide = [name for name in subject.checkpoint.tensors if name not in accounted]
    present.update(wide)
    _judge_missing(found, subject, present)
    _judge_unknown(found, subject, wide)
    _judge_wide(found, subject, wide)
    found.passed = (
        f"{len(subject.checkpoint.tensors):,} tensors, as a {subject.layout.model_type} of this config needs them"
    )
    if found.count:
        found.failed = f"{found.count:,} tensors are missing, unknown, or of the wrong type or shape"
        prefixed = [name.startswith("thinker.") for name in subject.checkpoint.tensors]
        if "thinker" in subject.layout.model_type and any(prefixed) and not all(prefixed):
            found.notes.append("names stand with and without the prefix thinker.: tensors were saved twice")
        if any(IN_MEMORY in name for name in subject.checkpoint.tensors) and "omni" in subject.layout.model_type:
            found.notes.append(
                f"names with {IN_MEMORY} are those of Transformers in memory, not those of a checkpoint: the tool saved "
                "without renaming back, and engines will not find them"
            )
    return found, sound


def _linear_problems(linear: LinearEntries, spec: TensorSpec | None) -> list[str]:
    problems = []
    packed = linear.packed
    if len(packed.shape) != 2 or packed.shape[1] % (BLOCK_SIZE // 2):
        return [f"{packed.name}: codes of shape {list(packed.shape)}; [out, in / 2] with in a multiple of 16 is needed"]
    rows, half = packed.shape
    if spec is not None and spec.shape != (rows, 2 * half):
        wanted = [spec.shape[0], spec.shape[-1] // 2]
        turned = ": transposed" if spec.shape == (2 * half, rows) else ""
        problems.append(
            f"{packed.name}: codes of shape {list(packed.shape)} where the config makes it {wanted}{turned}"
        )
    missing = [
        what
        for what, entry in (("block scale", linear.block_scale), ("tensor scale", linear.tensor_scale))
        if entry is None
    ]
    problems += [f"{linear.module}: its {what} is missing" for what in missing]
    if linear.block_scale is not None:
        wanted_shape = (rows, 2 * half // BLOCK_SIZE)
        problems += _entry_problem(linear.block_scale, "F8_E4M3", (wanted_shape,))
    for entry in (linear.tensor_scale, linear.input_scale):
        if entry is not None:
            problems += _entry_problem(entry, "F32", ((), (1,)))
    if linear.branch is not None:
        rank = (linear.branch.up.shape or (0,))[-1]
        problems += _entry_problem(linear.branch.up, "BF16", ((rows, rank),))
        problems += _entry_problem(linear.branch.down, "BF16", ((rank, 2 * half),))
    return problems


def _coded_problems(linear: CodedLinear, spec: TensorSpec | None, model_type: str) -> list[str]:
    scheme = linear.scheme.value.upper()
    if spec is None:
        return [f"{linear.codes.name}: {scheme}, but a {model_type} of this config has no such linear"]
    if not spec.is_linear:
        return [f"{linear.codes.name}: {scheme}, but it is no linear layer's weight"]
    problems = linear.problems()
    if not problems and linear.shape != spec.shape:
        turned = ": transposed" if linear.shape == spec.shape[::-1] else ""
        problems.append(
            f"{linear.codes.name}: {scheme} codes of a weight of {list(linear.shape)} where the config makes it "
            f"{list(spec.shape)}{turned}"
        )
    return problems


def _entry_problem(entry: TensorEntry, dtype: str, shapes: tuple[tuple[int, ...], ...]) -> list[str]:
    if entry.dtype == dtype and entry.shape in shapes:
        return []
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    return [f"{entry.name}: {entry.dtype} {list(entry.shape)} where {dtype} {wanted} is needed"]


def _judge_missing(found: Findings, subject: Subject, present: set[str]) -> None:
    missing = subject.layout.missing(present)
    if not any(name.startswith(SPEECH_PREFIXES) for name in present):
        # One cause, not a thousand: config.speech tells it.
        speechless = [name for name in missing if not name.startswith(SPEECH_PREFIXES)]
        if len(speechless) < len(missing):
            found.notes.append("the speech part is missing as a whole; see config.speech")
        missing = speechless
    for name in missing:
        found.add(f"{name}: missing")


def _judge_unknown(found: Findings, subject: Subject, wide: list[str]) -> None:
    has_kv = any(_claims_kv(claim.raw) for claim in subject.claims)
    statistics = 0
    for name in subject.layout.unknown(wide):
        if KV_SCALE.search(name):
            if not has_kv:
                found.add(f"{name}: a scale of the key-value cache, which the config does not say is quantized")
        elif name.endswith(("_scale", "_scale_inv")) and _is_other_fp8(subject, name.rpartition(".")[0]):
            continue
        elif name.endswith(STATISTIC):
            statistics += 1
            found.add(f"{name}: a calibration statistic; engines do not read it")
        elif name.rpartition(".")[0] in subject.linears:
            found.add(f"{name}: a scale beside a weight that is not FP4")
        else:
            found.add(f"{name}: a {subject.layout.model_type} of this config has no such tensor")
    if statistics:
        found.notes.append(
            f"{statistics:,} _amax statistics: the model was calibrated, but its weights were not packed"
        )


def _judge_wide(found: Findings, subject: Subject, wide: list[str]) -> None:
    by_name, fused = subject.layout.by_name, subject.layout.fused_by_name
    tensors = subject.checkpoint.tensors
    for name in wide:
        entry = tensors[name]
        if spec := by_name.get(name):
            if entry.shape != spec.shape:
                turned = ": transposed" if entry.shape == spec.shape[::-1] else ""
                found.add(f"{name}: shape {list(entry.shape)} where the config makes it {list(spec.shape)}{turned}")
            elif entry.dtype not in WIDE_FLOATS and not _is_other_fp8(subject, spec.module):
                found.add(f"{name}: {entry.dtype}, but a tensor that is not FP4 must be {', '.join(WIDE_FLOATS)}")
        elif name in fused and subject.layout.fused_form(name, entry.shape) is None:
            shapes = " or ".join(str(list(shape)) for shape in subject.layout.fused_shapes(name))
            found.add(f"{name}: shape {list(entry.shape)} where the config makes it {shapes}")


def _claims_kv(raw: object) -> bool:
    if not isinstance(raw, dict):
        return False
    inner = raw.get("quantization")
    legacy = inner if isinstance(inner, dict) else {}
    return bool(raw.get("kv_cache_scheme") or raw.get("kv_cache_quant_algo") or legacy.get("kv_cache_quant_algo"))


def _is_other_fp8(subject: Subject, module: str) -> bool:
    """FP8 in a form that is not judged here, as mixed precision says."""
    return "FP8" in subject.mixed_layers.get(module, "") and module not in subject.coded
