"""Whether vLLM and vLLM-Omni read a checkpoint as what it is, whatever the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from omnifp4.doctor import engine_rules as rules
from omnifp4.doctor.facts import Facts, Kind
from omnifp4.formats.scheme import Scheme
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.doctor import Ability
from omnifp4.receipt.verification import Check

CAN, CANNOT, NOT_KNOWN = Ability.CAN, Ability.CANNOT, Ability.NOT_KNOWN
REPAIR: Final = "omnifp4 repair {model} OUT writes the ignore list that fits the tensors"
REQUANTIZE: Final = "omnifp4 quantize ORIGINAL OUT --format compressed-tensors"


@dataclass
class Reading:
    """How an engine reads a checkpoint: the ability, and what was told, with fixes that may hold ``{model}``."""

    ability: Ability = CAN
    told: list[tuple[Ability, str, str]] = field(default_factory=list)

    def say(self, ability: Ability, reason: str, fix: str = "") -> None:
        """Add a reason; the worst ability counts."""
        order = (CAN, NOT_KNOWN, CANNOT)
        self.ability = max(self.ability, ability, key=order.index)
        self.told.append((ability, reason, fix))


def read_by_vllm(facts: Facts, checks: tuple[Check, ...], version: str) -> Reading:
    """Plain vLLM, which of an omni model builds the thinker alone."""
    read = _read_kind(facts, version)
    if facts.kind is not Kind.NVFP4 or facts.branches:
        return read
    is_omni = facts.model_type.startswith(("qwen3_omni", "qwen2_5_omni"))
    wide_head = not any(module.endswith("lm_head") for module in facts.fp4)
    if is_omni and facts.dialect == "modelopt" and not facts.is_mixed and wide_head:
        known = rules.VLLM_NAMELESS_HEAD.holds(version)
        read.say(
            CANNOT if known else NOT_KNOWN,
            "vLLM 0.26 to 0.33 builds the thinker's lm_head without a name: no ignore entry of ModelOpt's form reaches it, "
            "so a BF16 head is taken for FP4 and does not load",
            f"{rules.CONVERT}, or serve it with vLLM-Omni",
        )
    elif is_omni and facts.dialect == "compressed-tensors":
        read.say(CAN, "compressed-tensors is read right: its targets leave the head alone")
    for finding in _misread(checks, r"\bvLLM(?!-Omni)", talker=False):
        read.say(CANNOT, finding, REPAIR)
    return read


def read_by_vllm_omni(facts: Facts, checks: tuple[Check, ...], version: str) -> Reading:
    """vLLM-Omni, where one config reaches thinker, talker and code2wav."""
    # A release reads what the vLLM of its number reads.
    read = _read_kind(facts, version)
    if facts.kind is not Kind.NVFP4 or facts.branches or not facts.is_omni:
        return read
    ignore = facts.claim.ignore if facts.claim is not None else ()
    if rules.VLLM_OMNI_WITHOUT_MAPPER.holds(version) and version:
        exact = facts.is_mixed or (
            facts.dialect == "compressed-tensors" and any("." in e for e in ignore if not e.startswith("re:"))
        )
        if exact:
            read.say(
                CANNOT,
                "vLLM-Omni 0.26 does not rename the config's names: exact ones match nothing, so routers are read as FP4",
                # A repair mends NVFP4 alone.
                rules.CONVERT
                if facts.coded
                else "vllm-omni 0.28 or later, or expressions that fit any prefix: " + REPAIR,
            )
    elif not rules.VLLM_OMNI_READ.holds(version):
        read.say(NOT_KNOWN, f"vLLM-Omni {version} was not read here, {rules.VLLM_OMNI_READ} were")
    for finding in _misread(checks, r"\bvLLM-Omni", talker=True):
        read.say(CANNOT, f"one quantization_config reaches every stage: {finding}", REPAIR)
    return read


def unread_schemes(facts: Facts, version: str) -> Iterator[tuple[Ability, str, str]]:
    """What vLLM of a version does not read of the linears in FP8, MXFP4 and INT8, or was not seen to read; with a fix."""
    unread: dict[str, str] = {}
    for module, linear in facts.coded.items() if facts.dialect == "modelopt" else ():
        if linear.scheme in (Scheme.MXFP4, Scheme.INT8):
            unread.setdefault(f"{linear.scheme} linears", module)
        elif ".experts." in module and linear.scale is not None and linear.scale.parameters > 1:
            unread.setdefault(f"{linear.scheme} experts with a scale for each channel", module)
    if unread:
        known = rules.VLLM_MODELOPT_UNREAD.holds(version)
        named = ", ".join(f"{what} (first {module})" for what, module in unread.items())
        yield (
            CANNOT if known else NOT_KNOWN,
            f"vLLM {rules.VLLM_MODELOPT_UNREAD} does not read from ModelOpt's form: {named}",
            rules.CONVERT,
        )
    if facts.coded and not rules.VLLM_SCHEMES_READ.holds(version):
        schemes = ", ".join(sorted({linear.scheme.value for linear in facts.coded.values()}))
        yield (
            NOT_KNOWN,
            f"linears in {schemes} are read by vLLM {rules.VLLM_SCHEMES_READ}; vLLM {version} was not read for them",
            f"vLLM {rules.VLLM_SCHEMES_READ.last}, or see what it says when it loads",
        )


def _read_kind(facts: Facts, version: str) -> Reading:
    read = Reading()
    if facts.branches:
        read.say(
            CANNOT,
            f"it is SVDQuant: {len(facts.branches):,} linears have a low-rank branch, which vLLM refuses (0.32) and no other "
            f"engine known here runs; without it their codes stand for other weights",
            rules.INSTEAD_OF_BRANCHES,
        )
        return read
    for ability, reason, fix in unread_schemes(facts, version):
        read.say(ability, reason, fix)
    if facts.kind is Kind.NVFP4:
        if facts.dialect == "auto-round":
            read.say(
                CANNOT,
                "AutoRound's own config is read as method inc, which refuses data_type nv_fp (vLLM 0.32)",
                rules.CONVERT,
            )
        elif facts.engine_claim is None:
            read.say(CANNOT, "config.json has no quantization_config: the codes would be read as weights", REPAIR)
        elif facts.dialect not in ("modelopt", "compressed-tensors"):
            read.say(CANNOT, f"quant_method {facts.dialect!r} is none that it reads as NVFP4", REPAIR)
        else:
            read.say(CAN, f"the method is read from config.json ({facts.dialect}): give no --quantization")
    elif facts.kind is Kind.AMAX_ONLY:
        read.say(
            CANNOT,
            "it holds BF16 weights and _amax values, which it does not read: there is no FP4 made at load; only ModelOpt's "
            "fake-quant worker reads them, slowly",
            REQUANTIZE,
        )
    elif facts.kind is Kind.CLAIM_ONLY:
        read.say(CANNOT, "its config claims NVFP4, but no tensor is", REQUANTIZE)
    elif facts.kind is Kind.OTHER:
        read.say(NOT_KNOWN, f"it is quantized with {facts.dialect or 'an unknown method'}")
    return read


def _misread(checks: tuple[Check, ...], engine: str, *, talker: bool) -> Iterator[str]:
    """The first finding of each check that says the engine takes a tensor for what it is not."""
    for check in checks:
        if check.verdict is not Verdict.FAIL:
            continue
        if check.name == "ignore.engines":
            found = [finding for finding in check.findings if re.search(engine, finding)]
        elif check.name == "ignore":
            found = [finding for finding in check.findings if _concerns(finding, talker=talker)]
        elif check.name in ("config.place", "fp4.coverage"):
            found = list(check.findings)
        else:
            continue
        if found:
            more = f" (and {len(found) - 1:,} more such findings)" if len(found) > 1 else ""
            yield f"{found[0]}{more}"


def _concerns(finding: str, *, talker: bool) -> bool:
    """Whether an engine builds the modules of this finding with the quantization config."""
    if re.search(r"\bcode2wav|code_predictor|audio_tower|projection", finding):
        return False
    return talker or "talker" not in finding
