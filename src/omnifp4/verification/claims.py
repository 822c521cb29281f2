"""Whether the config announces the quantization where engines look, in terms that they know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from omnifp4.checkpoint.artifact import ENGINE_PLACE
from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, MODELOPT, QuantizationClaim
from omnifp4.checkpoint.folder import LEGACY_QUANT_CONFIG_NAME
from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.verification.findings import Findings
from omnifp4.verification.subject import Subject, engine_claim

AUTO_ROUND: Final = "auto-round"
CT_FORMATS: Final = ("nvfp4-pack-quantized", "mixed-precision")
FP4_ALGORITHMS: Final = ("NVFP4", "W4A16_NVFP4")
MIXED: Final = "MIXED_PRECISION"

REPAIR: Final = "omnifp4 repair IN OUT writes a quantization_config that says what the tensors are"


def check_place(subject: Subject) -> Findings:
    """``config.place``: the quantization_config is at the top level of config.json, and nothing contradicts it."""
    found = Findings(
        "config.place",
        "quantization_config is where engines look",
        fix=REPAIR,
        passed=f"found at {ENGINE_PLACE}",
        failed="engines would not find it, or find two that disagree",
    )
    raw = subject.checkpoint.config.get("quantization_config")
    if raw is not None and not isinstance(raw, dict):
        found.add(f"{ENGINE_PLACE} is a {type(raw).__name__}, not an object")
        return found
    if not subject.claims:
        if subject.fp4:
            found.add(
                f"{len(subject.fp4):,} linears are FP4, but config.json has no quantization_config: engines would read "
                "the codes as weights"
            )
        else:
            found.unchecked = "there is no quantization_config, and no tensor is FP4"
        return found
    top = engine_claim(subject)
    legacy = next((claim for claim in subject.claims if claim.place == LEGACY_QUANT_CONFIG_NAME), None)
    if top is None:
        _judge_elsewhere(found, subject.claims, legacy)
    elif legacy is not None:
        _compare_legacy(found, top, legacy)
    if top is not None and not subject.fp4:
        found.notes.append("yet no tensor is FP4")
    return found


def _judge_elsewhere(found: Findings, claims: tuple[QuantizationClaim, ...], legacy: QuantizationClaim | None) -> None:
    if legacy is None:
        places = ", ".join(claim.place.removeprefix("config.json: ") for claim in claims)
        found.add(f"config.json has it at {places} only; engines look at the top level and see a wide checkpoint")
        return
    algorithm = algorithm_of(legacy)
    if algorithm == "NVFP4" or algorithm == MIXED:
        found.passed = f"only in {LEGACY_QUANT_CONFIG_NAME}: vLLM reads it there, Transformers and others do not"
    else:
        found.add(f"only in {LEGACY_QUANT_CONFIG_NAME}, where vLLM refuses quant_algo {algorithm or 'none'}")


def _compare_legacy(found: Findings, top: QuantizationClaim, legacy: QuantizationClaim) -> None:
    if top.dialect != MODELOPT.name:
        found.add(f"{LEGACY_QUANT_CONFIG_NAME} says ModelOpt, but config.json says {top.dialect or 'no quant_method'}")
        return
    ours, theirs = algorithm_of(top), algorithm_of(legacy)
    if theirs != ours and not (theirs == "NVFP4" and ours == "W4A16_NVFP4"):
        found.add(f"{LEGACY_QUANT_CONFIG_NAME} says quant_algo {theirs or 'none'}, config.json says {ours or 'none'}")
    if legacy.group_size and top.group_size and legacy.group_size != top.group_size:
        found.add(f"{LEGACY_QUANT_CONFIG_NAME} says group_size {legacy.group_size}, config.json says {top.group_size}")
    if set(legacy.ignore) != set(top.ignore):
        only = sorted(set(legacy.ignore) ^ set(top.ignore))
        found.add(f"exclude_modules of {LEGACY_QUANT_CONFIG_NAME} and ignore of config.json differ, as in {only[0]!r}")
    found.notes.append(f"{LEGACY_QUANT_CONFIG_NAME} stands beside it; config.json wins")


def algorithm_of(claim: QuantizationClaim) -> str:
    """ModelOpt's ``quant_algo`` in capitals, empty where there is none."""
    inner = claim.raw.get("quantization")
    value = (inner if isinstance(inner, dict) else claim.raw).get("quant_algo")
    return value.upper() if isinstance(value, str) else ""


def check_scheme(subject: Subject) -> Findings:
    """``config.scheme``: method, algorithm, format, bits and group size are those of NVFP4, and fit the tensors."""
    found = Findings("config.scheme", "the quantization_config says NVFP4", fix=REPAIR)
    claim = subject.claim
    if claim is None:
        found.unchecked = "there is no quantization_config"
        return found
    found.failed = f"what {claim.place} says is not NVFP4 as engines know it"
    if claim.dialect == MODELOPT.name:
        _judge_modelopt(found, claim, subject)
    elif claim.dialect == COMPRESSED_TENSORS.name:
        _judge_compressed_tensors(found, claim)
    elif claim.dialect == AUTO_ROUND:
        _judge_auto_round(found, claim)
    else:
        found.add(f"quant_method {claim.dialect!r} is none of modelopt, compressed-tensors, auto-round")
    if not found.count and subject.dialect is not None:
        wanted = MODELOPT if claim.dialect == MODELOPT.name else COMPRESSED_TENSORS
        if subject.dialect.name != wanted.name:
            found.add(
                f"the config is of {claim.dialect}, but the tensors are named as {subject.dialect.name} names them"
            )
    return found


def _judge_modelopt(found: Findings, claim: QuantizationClaim, subject: Subject) -> None:
    algorithm = algorithm_of(claim)
    found.passed = f"modelopt, {algorithm}, groups of {claim.group_size or BLOCK_SIZE}"
    if algorithm == MIXED:
        layers = subject.mixed_layers
        if not any(value in FP4_ALGORITHMS for value in layers.values()):
            found.add("quant_algo is MIXED_PRECISION, but quantized_layers names no layer of NVFP4 or W4A16_NVFP4")
        found.passed = f"modelopt, {MIXED}, {len(layers):,} layers named"
    elif algorithm not in FP4_ALGORITHMS:
        found.add(f"quant_algo {algorithm or 'none'} is none of {', '.join((*FP4_ALGORITHMS, MIXED))}")
    _judge_numbers(found, claim, required=False)
    if claim.group_size not in (0, BLOCK_SIZE):
        found.add(_wrong_group(claim.group_size))


def _judge_compressed_tensors(found: Findings, claim: QuantizationClaim) -> None:
    raw = claim.raw
    form = raw.get("format")
    group_forms = [group.get("format") for _, group in _groups(raw)]
    found.passed = f"compressed-tensors, {CT_FORMATS[0]}, {claim.activations.value}"
    if form not in CT_FORMATS or (form == CT_FORMATS[1] and CT_FORMATS[0] not in group_forms):
        found.add(f"format {form!r} is not {CT_FORMATS[0]}")
    if raw.get("quantization_status") not in ("compressed", None):
        found.add(f"quantization_status is {raw.get('quantization_status')!r}, not compressed")
    _judge_numbers(found, claim, required=True)


def _judge_numbers(found: Findings, claim: QuantizationClaim, *, required: bool) -> None:
    groups = list(_groups(claim.raw))
    if required and not groups:
        found.add("config_groups is missing or empty, so no layer has a scheme")
    for name, group in groups:
        targets = group.get("targets")
        if required and not (isinstance(targets, list) and targets):
            found.add(f"config_groups.{name} has no targets")
        for part in ("weights", "input_activations"):
            numbers = group.get(part)
            if numbers is None:
                if part == "weights":
                    found.add(f"config_groups.{name} says nothing of weights")
                continue
            if not isinstance(numbers, dict):
                found.add(f"config_groups.{name}.{part} is no object")
                continue
            if numbers.get("num_bits") != 4 or numbers.get("type") != "float":
                found.add(
                    f"config_groups.{name}.{part} is of {numbers.get('num_bits')!r} bits and type "
                    f"{numbers.get('type')!r}, not 4 and 'float'"
                )
            elif numbers.get("group_size") not in (None, BLOCK_SIZE):
                found.add(f"config_groups.{name}.{part}: {_wrong_group(numbers.get('group_size'))}")
            if numbers.get("strategy") not in (None, "tensor_group"):
                found.add(f"config_groups.{name}.{part} has strategy {numbers.get('strategy')!r}, not 'tensor_group'")


def _judge_auto_round(found: Findings, claim: QuantizationClaim) -> None:
    raw = claim.raw
    found.passed = (
        "auto-round's own form of config over compressed-tensors names: Transformers reads it with auto-round installed; "
        "vLLM refuses data_type nv_fp (AutoRound's format llm_compressor is read by both)"
    )
    if raw.get("bits") != 4 or raw.get("data_type") not in ("nv_fp", "nv_fp4", "nv_fp4_with_static_gs"):
        found.add(f"bits {raw.get('bits')!r} and data_type {raw.get('data_type')!r} are not NVFP4")
    if claim.group_size != BLOCK_SIZE:
        found.add(_wrong_group(claim.group_size))
    if "llm_compressor" not in str(raw.get("packing_format")):
        found.add(f"packing_format {raw.get('packing_format')!r} is not auto_round:llm_compressor")


def _groups(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    groups = raw.get("config_groups")
    if isinstance(groups, dict):
        for name, group in groups.items():
            if isinstance(group, dict):
                yield name, group


def _wrong_group(size: object) -> str:
    return f"group_size is {size!r}: engines read NVFP4 in groups of {BLOCK_SIZE} only"
