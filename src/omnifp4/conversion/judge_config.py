"""The config: whether the model speaks, and where and how it announces its quantization."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from omnifp4.checkpoint.artifact import ENGINE_PLACE
from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, DIALECTS, Dialect, QuantizationClaim
from omnifp4.checkpoint.folder import LEGACY_QUANT_CONFIG_NAME, Checkpoint
from omnifp4.conversion.artifact import AUTO_ROUND, Artifact, read_artifact
from omnifp4.conversion.cache_scheme import cache_scheme
from omnifp4.conversion.ledger import Ledger
from omnifp4.conversion.original import Original
from omnifp4.conversion.packaging import producer
from omnifp4.conversion.patient import Patient, Treatment
from omnifp4.errors import CheckpointError
from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.receipt.repair import Effect

SPEECH_FLAG: Final = "enable_audio_output"
SPEECH_PREFIXES: Final = ("talker.", "code2wav.", "token2wav.")

ALGORITHMS: Final = ("NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
FORMATS: Final = ("nvfp4-pack-quantized", "mixed-precision")

ENGINE_RENAMES: Final = (
    ("thinker.model.", "language_model.model."),
    ("thinker.model.", "thinker.language_model.model."),
    ("talker.model.", "talker.language_model.model."),
    ("thinker.", ""),
)
"""Prefixes that vLLM and vLLM-Omni replace in names of modules, but not inside expressions that name them."""


def settle_speech(checkpoint: Checkpoint, original: Original | None, ledger: Ledger) -> Checkpoint:
    """Make ``enable_audio_output`` say what the weights are; leftovers of half a talker go."""
    config, names = checkpoint.config, checkpoint.tensors
    if not isinstance(config.get("talker_config"), dict):
        return checkpoint
    says = config.get(SPEECH_FLAG, True) is True
    speech = [name for name in names if name.startswith(SPEECH_PREFIXES)]
    can_fetch = original is not None and any(t.spec.name.startswith(SPEECH_PREFIXES) for t in original.source.tensors)
    if says and not speech and not can_fetch:
        problem = f"{SPEECH_FLAG} is true and there are no weights for it: a random talker would be made"
        ledger.mend("config.speech", SPEECH_FLAG, problem, "set to false")
        return replace(checkpoint, config={**config, SPEECH_FLAG: False})
    if says or not speech:
        return checkpoint
    artifact = read_artifact(checkpoint)
    missing = [n for n in artifact.layout.missing(artifact.logical_names) if n.startswith(SPEECH_PREFIXES)]
    if missing and not can_fetch:
        problem = f"{SPEECH_FLAG} is false, and {len(speech):,} tensors of an incomplete talker are there"
        ledger.mend("config.speech", SPEECH_FLAG, problem, "they were left out", Effect.NONE)
        return replace(checkpoint, tensors={name: entry for name, entry in names.items() if name not in speech})
    problem = f"{SPEECH_FLAG} is false, though the weights of talker and vocoder are there"
    ledger.mend("config.speech", SPEECH_FLAG, problem, "set to true")
    return replace(checkpoint, config={**config, SPEECH_FLAG: True})


def judge_claim(patient: Patient, treatment: Treatment, wide: list[str], quantized: list[str]) -> None:
    """Whether the quantization_config is where engines look, and says what the files are; else a new one.

    Args:
        patient: the artifact.
        treatment: gets the new quantization_config, unless the old one is right.
        wide: modules of the linears that the result holds wide.
        quantized: modules of those in NVFP4.
    """
    artifact, ledger = patient.artifact, patient.ledger
    dialect, claim = artifact.dialect, artifact.claim
    problems = list(_place_problems(artifact))
    if claim is not None:
        problems += [("config.scheme", text) for text in _scheme_problems(claim, dialect)]
        if claim.dialect == dialect.name and not artifact.is_mixed:
            problems += [("config.ignore", text) for text in ignore_problems(dialect, claim.ignore, wide, quantized)]
    legacy = next((c for c in artifact.claims if c.place == LEGACY_QUANT_CONFIG_NAME), None)
    if legacy is not None and claim is not legacy and (problem := _legacy_problem(claim, legacy)):
        ledger.mend("config.legacy", LEGACY_QUANT_CONFIG_NAME, problem, "left out: config.json says all of it")
    changed = claim is not None and claim.dialect in DIALECTS and treatment.activations is not claim.activations
    if artifact.is_mixed and not problems:
        return
    for kind, problem in problems:
        ledger.mend(kind, "quantization_config", problem, "written anew at the top level, from what the files hold")
    if problems or changed:
        entries = dialect.ignore_entries(wide, quantized)
        treatment.quantization_config = dialect.quantization_config(treatment.activations, entries, producer())
        try:
            cache = cache_scheme(claim, dialect.name)
        except CheckpointError as error:
            ledger.fail("config.cache", "quantization_config", str(error), "a config without that cache scheme")
            return
        if cache:
            treatment.quantization_config["kv_cache_scheme"] = cache


def _place_problems(artifact: Artifact) -> Iterator[tuple[str, str]]:
    claim = artifact.claim
    if claim is None:
        yield "config.place", "config.json has none, so engines would read the codes as weights"
    elif claim.place != ENGINE_PLACE:
        yield "config.place", f"it is only at {claim.place}, where engines do not look"


def _scheme_problems(claim: QuantizationClaim, dialect: Dialect) -> Iterator[str]:
    raw = claim.raw
    if claim.dialect == AUTO_ROUND and dialect is COMPRESSED_TENSORS:
        return
    if claim.dialect != dialect.name:
        yield f"quant_method is {claim.dialect or 'missing'}, and the tensors are named as in {dialect.name}"
        return
    if claim.group_size != BLOCK_SIZE and not (claim.group_size == 0 and isinstance(raw.get("quantized_layers"), dict)):
        yield f"group_size is {claim.group_size or 'missing'}, not {BLOCK_SIZE}"
    if dialect is COMPRESSED_TENSORS:
        if raw.get("format") not in FORMATS:
            yield f"format is {raw.get('format')!r}, not {FORMATS[0]}"
        if raw.get("quantization_status") not in ("compressed", None):
            yield f"quantization_status is {raw.get('quantization_status')!r}, not compressed"
        if not isinstance(raw.get("config_groups"), dict) or not raw["config_groups"]:
            yield "config_groups is missing, so no layer has a scheme"
    elif algorithm(claim) not in ALGORITHMS:
        yield f"quant_algo is {algorithm(claim) or 'missing'}, none of {', '.join(ALGORITHMS)}"
    yield from _number_problems(raw)


def _number_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    groups = raw.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        numbers = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(numbers, dict):
            yield f"config_groups.{name} says nothing of weights"
        elif numbers.get("num_bits") != 4 or numbers.get("type") != "float":
            yield f"config_groups.{name}.weights is of {numbers.get('num_bits')!r} bits and type {numbers.get('type')!r}"
        elif not group.get("targets") and "format" in raw:
            yield f"config_groups.{name} has no targets"


def ignore_problems(
    dialect: Dialect, entries: Sequence[str], wide: Iterable[str], quantized: Iterable[str]
) -> Iterator[str]:
    """What is wrong with an ignore list, by the names in the checkpoint and by those that engines use."""
    if dialect is COMPRESSED_TENSORS and (broken := [entry for entry in entries if not _compiles(entry)]):
        yield f"ignore entry {broken[0]!r} is no regular expression"
        return
    unnamed = [module for module in wide if not _is_ignored(dialect, module, entries)]
    named = [module for module in quantized if dialect.is_ignored(module, entries)]
    if unnamed:
        yield f"ignore does not name {len(unnamed):,} linears that are wide, as {unnamed[0]}"
    if named:
        yield f"ignore names {len(named):,} linears that are in NVFP4, as {named[0]}"


def _is_ignored(dialect: Dialect, module: str, entries: Sequence[str]) -> bool:
    if not dialect.is_ignored(module, entries):
        return False
    if dialect is not COMPRESSED_TENSORS or module in entries:
        return True
    names = [new + module.removeprefix(old) for old, new in ENGINE_RENAMES if module.startswith(old)]
    return all(dialect.is_ignored(name, entries) for name in names)


def _compiles(entry: str) -> bool:
    try:
        re.compile(entry.removeprefix("re:"))
    except re.error:
        return not entry.startswith("re:")
    return True


def algorithm(claim: QuantizationClaim) -> str:
    """ModelOpt's ``quant_algo`` in capitals; empty where there is none."""
    inner = claim.raw.get("quantization")
    value = (inner if isinstance(inner, dict) else claim.raw).get("quant_algo")
    return value.upper() if isinstance(value, str) else ""


def _legacy_problem(claim: QuantizationClaim | None, legacy: QuantizationClaim) -> str:
    if claim is None:
        return ""
    if claim.dialect != legacy.dialect:
        return f"it says {legacy.dialect}, config.json says {claim.dialect or 'nothing'}"
    ours, theirs = algorithm(claim), algorithm(legacy)
    if theirs != ours and not (theirs == "NVFP4" and ours == "W4A16_NVFP4"):
        return f"it says quant_algo {theirs or 'none'}, config.json says {ours or 'none'}"
    if legacy.group_size and claim.group_size and legacy.group_size != claim.group_size:
        return f"it says group_size {legacy.group_size}, config.json says {claim.group_size}"
    if set(legacy.ignore) != set(claim.ignore):
        return "its exclude_modules are not the ignore of config.json"
    return ""
