"""Whether engines, under their own names of modules, read every linear as what it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate

from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, MODELOPT, QuantizationClaim
from omnifp4.verification.claims import FP4_ALGORITHMS
from omnifp4.verification.engines import FUSED, STAGES, Stage, group_modules
from omnifp4.verification.findings import Findings
from omnifp4.verification.matching import REGEX_PREFIX, excluded_by_compressed_tensors, expand_modelopt, taken_by_name
from omnifp4.verification.subject import Subject, is_readable
from omnifp4.verification.taking import MEND_IGNORE, Taking

Answer = bool | None
"""FP4, wide, or None: the engine refuses a module of which only a part is excluded."""


def check_engines(subject: Subject, taking: Taking) -> Findings:
    """``ignore.engines``: the entries work under vLLM's and vLLM-Omni's names, fused modules included."""
    found = Findings("ignore.engines", "ignore works under the names that engines use", fix=MEND_IGNORE)
    claim, stages = subject.claim, STAGES.get(subject.layout.model_type, ())
    if claim is None or claim.dialect not in (MODELOPT.name, COMPRESSED_TENSORS.name) or not subject.fp4:
        found.unchecked = "there is nothing to ask" if claim is None or not subject.fp4 else "no rules of that dialect"
        return found
    if not stages:
        found.unchecked = f"the engines known here do not read a {subject.layout.model_type} as NVFP4"
        return found
    told = {*taking.claimed_but_wide, *taking.unnamed_wide, *taking.ignored_fp4}
    asked = 0
    for stage in stages:
        groups = group_modules(stage, taking.present)
        answers = _answers(subject, claim, stage, groups)
        for name, modules in groups.items():
            asked += 1
            fp4 = [module for module in modules if module in subject.fp4]
            if told.intersection(modules) or not all(is_readable(subject.linear_specs[module]) for module in fp4):
                continue
            if 0 < len(fp4) < len(modules):
                wide = next(module for module in modules if module not in subject.fp4)
                found.add(f"{stage.title} builds {name} as one: {fp4[0]} is FP4, {wide} is not")
                continue
            answer = answers[name]
            if answer is None:
                found.add(f"{stage.title} refuses {name}: only some of its parts are excluded")
            elif answer is not bool(fp4):
                is_fp4, reads = ("FP4", "wide") if fp4 else ("wide", "FP4")
                found.add(f"{modules[0]}: {is_fp4}, but {stage.title} knows it as {name} and reads it as {reads}")
        if stage.unnamed_head and claim.dialect == MODELOPT.name and not subject.mixed_layers:
            found.notes.append(
                "vLLM up to 0.33 builds this model's head without a name, so no ModelOpt entry can exclude it there; "
                "vLLM-Omni names it"
            )
    found.passed = f"{asked:,} modules are read as what they are by {', '.join(stage.title for stage in stages)}"
    found.failed = f"{found.count:,} modules would be read as what they are not"
    return found


def _answers(
    subject: Subject, claim: QuantizationClaim, stage: Stage, groups: dict[str, list[str]]
) -> dict[str, Answer]:
    if subject.mixed_layers:
        layers = {stage.rename(name) for name, algo in subject.mixed_layers.items() if algo in FP4_ALGORITHMS}
        renamed = {module: stage.module_name(module) for modules in groups.values() for module in modules}
        named = taken_by_name(layers, renamed.values())
        return {name: _all_or_none([renamed[m] in named for m in modules]) for name, modules in groups.items()}
    answer = (
        _modelopt(claim.ignore, stage) if claim.dialect == MODELOPT.name else _compressed_tensors(claim, stage, groups)
    )
    return {name: answer(name) for name in groups}


def _all_or_none(values: Iterable[bool]) -> Answer:
    kinds = set(values)
    return kinds.pop() if len(kinds) == 1 else None


def _modelopt(ignore: Iterable[str], stage: Stage) -> Callable[[str], Answer]:
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
                return False
        elif name in exact or ("experts" in name and name in expert_entries):
            return False
        return not (any(entry in name for entry in literals) or any(p.match(name) for p in patterns))

    return answer


def _compressed_tensors(
    claim: QuantizationClaim, stage: Stage, groups: dict[str, list[str]]
) -> Callable[[str], Answer]:
    """vLLM's `should_ignore_layer`: each part of a fused module, the first expert for all; heads are no target."""
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
    excluded = excluded_by_compressed_tensors([part for names in parts.values() for part in names], entries)

    def answer(name: str) -> Answer:
        if name.endswith("lm_head"):
            return False
        ignored = _all_or_none(part in excluded for part in parts[name])
        return None if ignored is None else not ignored

    return answer
