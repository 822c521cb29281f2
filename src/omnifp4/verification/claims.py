"""Whether the config announces the quantization where engines look, in terms that they know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from omnifp4.checkpoint.artifact import ENGINE_PLACE
from omnifp4.checkpoint.branch import BRANCH_ALGORITHM
from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, MODELOPT, QuantizationClaim
from omnifp4.checkpoint.dialects.compressed_tensors import FORMATS
from omnifp4.checkpoint.folder import LEGACY_QUANT_CONFIG_NAME
from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.formats.scheme import Scheme
from omnifp4.verification.findings import Findings
from omnifp4.verification.matching import group_scheme
from omnifp4.verification.subject import Subject, engine_claim

AUTO_ROUND: Final = "auto-round"
NVFP4_FORMAT: Final = FORMATS[Scheme.NVFP4]
MIXED_FORMAT: Final = "mixed-precision"

CODED_FORMATS: Final[Mapping[Scheme, tuple[str, ...]]] = {
    Scheme.MXFP4: (FORMATS[Scheme.MXFP4],),
    Scheme.FP8: (FORMATS[Scheme.FP8], "naive-quantized"),
    Scheme.INT8: (FORMATS[Scheme.INT8], "int-quantized", "naive-quantized"),
}
"""What compressed-tensors calls the layouts of the schemes beside NVFP4."""
FP4_ALGORITHMS: Final = ("NVFP4", "W4A16_NVFP4")
CODED_ALGORITHMS: Final = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP4")
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
        if subject.quantized:
            found.add(
                f"{len(subject.quantized):,} linears are {'quantized' if subject.coded else 'FP4'}, but config.json has no quantization_config: engines would read "
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
    if top is not None and not subject.quantized:
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
        _judge_compressed_tensors(found, claim, subject)
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
        known = FP4_ALGORITHMS if subject.fp4 or not subject.coded else (*FP4_ALGORITHMS, *CODED_ALGORITHMS)
        if not any(value in known for value in layers.values()):
            found.add(f"quant_algo is MIXED_PRECISION, but quantized_layers names no layer of {' or '.join(known)}")
        found.passed = f"modelopt, {MIXED}, {len(layers):,} layers named"
    elif algorithm == BRANCH_ALGORITHM or any(linear.branch for linear in subject.fp4.values()):
        _judge_branches(found, algorithm, claim, subject)
    elif algorithm not in FP4_ALGORITHMS and not (subject.coded and not subject.fp4 and algorithm in CODED_ALGORITHMS):
        found.add(f"quant_algo {algorithm or 'none'} is none of {', '.join((*FP4_ALGORITHMS, MIXED))}")
    if not subject.coded:
        _judge_numbers(found, claim, subject, required=False)
    if subject.fp4 and claim.group_size not in (0, BLOCK_SIZE):
        found.add(_wrong_group(claim.group_size))


def _judge_branches(found: Findings, algorithm: str, claim: QuantizationClaim, subject: Subject) -> None:
    """Low-rank branches: beside every FP4 linear, under the algorithm that says so."""
    without = [module for module, linear in subject.fp4.items() if linear.branch is None]
    if algorithm != BRANCH_ALGORITHM:
        found.add(
            f"quant_algo {algorithm or 'none'} says nothing of the branches that are there: {BRANCH_ALGORITHM} does"
        )
    elif without:
        found.add(f"quant_algo is {BRANCH_ALGORITHM}, but {without[0]} has no branch beside it")
    found.notes.append(
        f"{BRANCH_ALGORITHM}: omnifp4 runs it; vLLM up to 0.32 refuses it, and so does Transformers alone"
    )


def _judge_compressed_tensors(found: Findings, claim: QuantizationClaim, subject: Subject) -> None:
    raw = claim.raw
    form = raw.get("format")
    group_forms = [group.get("format") or form for _, group in _groups(raw)]
    wanted: dict[str, tuple[str, ...]] = {}
    if subject.fp4 or not subject.coded:
        wanted[NVFP4_FORMAT] = (NVFP4_FORMAT,)
    wanted |= {FORMATS[linear.scheme]: CODED_FORMATS[linear.scheme] for linear in subject.coded.values()}
    found.passed = f"compressed-tensors, {', '.join(wanted)}, {claim.activations.value}"
    for name, names in wanted.items():
        if form not in (*names, MIXED_FORMAT) or (form == MIXED_FORMAT and not set(names).intersection(group_forms)):
            found.add(
                f"format {form!r} is not {name if len(wanted) == 1 else f'{MIXED_FORMAT} with a group of {name}'}"
            )
    if branch := next((module for module, linear in subject.fp4.items() if linear.branch), ""):
        found.add(f"{branch} has a low-rank branch, which compressed-tensors has no word for: engines leave it out")
    if raw.get("quantization_status") not in ("compressed", None):
        found.add(f"quantization_status is {raw.get('quantization_status')!r}, not compressed")
    _judge_numbers(found, claim, subject, required=True)


def _judge_numbers(found: Findings, claim: QuantizationClaim, subject: Subject, *, required: bool) -> None:
    schemes = {linear.scheme for linear in subject.coded.values()}
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
            if part == "input_activations" and numbers.get("num_bits") == 8 and group_scheme(group) in schemes:
                continue
            if part == "weights" and group_scheme(group) in schemes:
                _judge_coded(found, name, group, claim)
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


def _judge_coded(found: Findings, name: str, group: Mapping[str, Any], claim: QuantizationClaim) -> None:
    """A group of a scheme beside NVFP4: the format that goes with it, and one scale for each channel, block or tensor."""
    scheme, numbers = group_scheme(group), group.get("weights")
    assert scheme is not None and isinstance(numbers, dict)
    form = group.get("format") or claim.raw.get("format")
    if form not in CODED_FORMATS[scheme]:
        found.add(
            f"config_groups.{name}: format {form!r} is not that of {scheme}: {' or '.join(CODED_FORMATS[scheme])}"
        )
    wanted = ("group",) if scheme is Scheme.MXFP4 else ("channel", "tensor")
    if numbers.get("strategy") not in wanted:
        found.add(
            f"config_groups.{name}.weights has strategy {numbers.get('strategy')!r}, {scheme} has {' or '.join(wanted)}"
        )
    if numbers.get("symmetric") is False:
        found.add(f"config_groups.{name}.weights is not symmetric: {scheme} with a zero point is not known here")


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
