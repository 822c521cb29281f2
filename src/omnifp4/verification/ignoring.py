"""Whether engines, under their own names of modules, read every linear as what it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from typing import Final, TypeVar

from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, MODELOPT, QuantizationClaim
from omnifp4.formats.scheme import Scheme
from omnifp4.verification.claims import algorithm_of
from omnifp4.verification.engines import FUSED, STAGES, Stage, group_modules
from omnifp4.verification.findings import Findings
from omnifp4.verification.matching import (
    ALGORITHM_SCHEMES,
    REGEX_PREFIX,
    excluded_by_compressed_tensors,
    expand_modelopt,
    layers_by_scheme,
    taken_by_name,
    targeted,
)
from omnifp4.verification.subject import Subject, is_readable
from omnifp4.verification.taking import MEND_IGNORE, Taking, called

Answer = Scheme | None
"""What the engine reads a module as; None: it refuses one of which only a part is excluded."""

UNREAD: Final = {(MODELOPT.name, Scheme.MXFP4), (MODELOPT.name, Scheme.INT8)}
"""Schemes that no engine known here reads from a dialect."""

UNREAD_EXPERTS: Final = {(MODELOPT.name, Scheme.FP8)}
"""Schemes of experts, with a scale for each channel, that no engine known here reads from a dialect."""


def check_engines(subject: Subject, taking: Taking) -> Findings:
    """``ignore.engines``: the entries work under vLLM's and vLLM-Omni's names, fused modules included."""
    found = Findings("ignore.engines", "ignore works under the names that engines use", fix=MEND_IGNORE)
    claim, stages = subject.claim, STAGES.get(subject.layout.model_type, ())
    if claim is None or claim.dialect not in (MODELOPT.name, COMPRESSED_TENSORS.name) or not subject.quantized:
        found.unchecked = (
            "there is nothing to ask" if claim is None or not subject.quantized else "no rules of that dialect"
        )
        return found
    if not stages:
        found.unchecked = f"the engines known here do not read a {subject.layout.model_type} as NVFP4"
        return found
    told = {*taking.claimed_but_wide, *taking.unnamed_wide, *taking.ignored, *taking.mistaken}
    asked, unread = 0, dict[str, str]()
    for stage in stages:
        groups = group_modules(stage, taking.present)
        answers = _answers(subject, claim, stage, groups)
        for name, modules in groups.items():
            asked += 1
            kinds = {module: subject.scheme_of(module) for module in modules}
            quantized = [module for module, scheme in kinds.items() if not scheme.is_wide]
            if told.intersection(modules) or not all(is_readable(subject.linear_specs[module]) for module in quantized):
                continue
            if len(set(kinds.values())) > 1:
                one = quantized[0]
                other = next(module for module, scheme in kinds.items() if scheme is not kinds[one])
                found.add(
                    f"{stage.title} builds {name} as one: {one} is {called(kinds[one])}, {other} is "
                    f"{'not' if kinds[other].is_wide else called(kinds[other])}"
                )
                continue
            scheme = kinds[modules[0]]
            form = (claim.dialect, scheme)
            if form in UNREAD or (form in UNREAD_EXPERTS and name.endswith(".experts")):
                unread.setdefault(f"{called(scheme)} {name.rpartition('.')[2]}", name)
                continue
            answer = answers[name]
            if answer is None:
                found.add(f"{stage.title} refuses {name}: only some of its parts are excluded")
            elif answer is not scheme:
                found.add(
                    f"{modules[0]}: {called(scheme)}, but {stage.title} knows it as {name} and reads it as {called(answer)}"
                )
        if stage.unnamed_head and claim.dialect == MODELOPT.name and not subject.mixed_layers:
            found.notes.append(
                "vLLM up to 0.33 builds this model's head without a name, so no ModelOpt entry can exclude it there; "
                "vLLM-Omni names it"
            )
    found.passed = f"{asked:,} modules are read as what they are by {', '.join(stage.title for stage in stages)}"
    found.failed = f"{found.count:,} modules would be read as what they are not"
    if unread:
        found.notes.append(f"vLLM up to 0.32 reads none of these from {claim.dialect}: {', '.join(unread)}")
    return found


def _answers(
    subject: Subject, claim: QuantizationClaim, stage: Stage, groups: dict[str, list[str]]
) -> dict[str, Answer]:
    if subject.mixed_layers:
        renamed = {module: stage.module_name(module) for modules in groups.values() for module in modules}
        said: dict[str, Scheme] = {}
        for scheme, layers in layers_by_scheme(subject.mixed_layers).items():
            # What the engine does not know it leaves wide.
            its = {stage.rename(layer) for layer in layers}
            said.update(dict.fromkeys(taken_by_name(its, renamed.values()), scheme or Scheme.WIDE))
        return {n: _all_or_none([said.get(renamed[m], Scheme.WIDE) for m in modules]) for n, modules in groups.items()}
    if claim.dialect == MODELOPT.name:
        answer = _modelopt(claim.ignore, stage, ALGORITHM_SCHEMES.get(algorithm_of(claim), Scheme.NVFP4))
    else:
        answer = _compressed_tensors(claim, stage, groups)
    return {name: answer(name) for name in groups}


Value = TypeVar("Value")


def _all_or_none(values: Iterable[Value]) -> Value | None:
    kinds = set(values)
    return kinds.pop() if len(kinds) == 1 else None


def _modelopt(ignore: Iterable[str], stage: Stage, scheme: Scheme) -> Callable[[str], Answer]:
    """vLLM's `is_layer_excluded`: the exact name, a part of the name, or a wildcard over the whole of it."""
    entries = [stage.rename(entry) for entry in expand_modelopt(ignore)]
    exact = set(entries)
    literals = [entry for entry in entries if entry]
    patterns = [re.compile(translate(entry)) for entry in entries if any(char in entry for char in "*?[")]
    expert_entries = "\n".join(entry for entry in entries if "experts" in entry)

    def answer(name: str) -> Answer:
        parent, dot, leaf = name.rpartition(".")
        parts = FUSED.get(leaf)
        if parts:
            named = _all_or_none(f"{parent}{dot}{part}" in exact for part in parts)
            if named is None:
                return None
            if named:
                return Scheme.WIDE
        elif name in exact or ("experts" in name and name in expert_entries):
            return Scheme.WIDE
        is_wide = any(entry in name for entry in literals) or any(p.match(name) for p in patterns)
        return Scheme.WIDE if is_wide else scheme

    return answer


def _compressed_tensors(
    claim: QuantizationClaim, stage: Stage, groups: dict[str, list[str]]
) -> Callable[[str], Answer]:
    """vLLM's `should_ignore_layer`: each part of a fused module, the first expert for all; heads are no target.

    Then its `find_matched_target`: a target that is the module's own name, those of all its parts, or its class.
    """
    entries = [
        entry if entry.startswith(REGEX_PREFIX) or "." not in entry else stage.rename(entry) for entry in claim.ignore
    ]
    parts: dict[str, list[str]] = {}
    for name in groups:
        parent, dot, leaf = name.rpartition(".")
        if leaf == "experts":
            parts[name] = [f"{name}.0.{part}_proj" for part in ("gate", "up", "down")]
        else:
            parts[name] = [f"{parent}{dot}{part}" for part in FUSED.get(leaf, (leaf,))]
    everything = list(dict.fromkeys([*groups, *(part for names in parts.values() for part in names)]))
    excluded = excluded_by_compressed_tensors(everything, entries)
    named, anything = targeted(claim, everything, classes=False), targeted(claim, everything)

    def answer(name: str) -> Answer:
        if name.endswith("lm_head"):
            return Scheme.WIDE
        ignored = _all_or_none(part in excluded for part in parts[name])
        if ignored is None:
            return None
        if ignored:
            return Scheme.WIDE
        if name in named and not name.endswith(".experts"):
            return named[name] or Scheme.WIDE
        if all(part in named for part in parts[name]):
            return _all_or_none(named[part] or Scheme.WIDE for part in parts[name])
        return anything.get(parts[name][0], Scheme.WIDE) or Scheme.WIDE

    return answer
