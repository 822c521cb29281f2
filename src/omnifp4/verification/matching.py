"""Which modules a quantization_config takes for FP4, for tens of thousands of modules at once.

It answers as `Dialect.is_ignored` does for one module at a time; a test holds the two together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate
from typing import Final

from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, QuantizationClaim

REGEX_PREFIX: Final = "re:"


def bad_patterns(entries: Iterable[str]) -> list[str]:
    """The ``re:`` entries that are no regular expressions."""
    return [entry for entry in entries if entry.startswith(REGEX_PREFIX) and _compiled(entry) is None]


def excluded_by_compressed_tensors(modules: Sequence[str], entries: Iterable[str]) -> set[str]:
    """Those of `modules` that some entry names, or matches from the start of the name."""
    exact: set[str] = set()
    patterns: list[re.Pattern[str]] = []
    for entry in entries:
        pattern = _compiled(entry)
        if pattern is not None:
            patterns.append(pattern)
        elif not entry.startswith(REGEX_PREFIX):
            exact.add(entry)
    return {module for module in modules if module in exact or any(p.match(module) for p in patterns)}


def expand_modelopt(entries: Iterable[str]) -> list[str]:
    """vLLM reads ``X*`` as ``X`` and ``X.*``."""
    expanded: list[str] = []
    for entry in entries:
        if entry.endswith("*") and not entry.endswith(".*"):
            expanded += [entry[:-1], entry[:-1] + ".*"]
        else:
            expanded.append(entry)
    return [entry for entry in dict.fromkeys(expanded) if entry]


def excluded_by_modelopt(modules: Sequence[str], entries: Iterable[str]) -> set[str]:
    """Those of `modules` in whose name an expanded entry occurs, or that it matches as a wildcard."""
    excluded: set[str] = set()
    # One search through all names joined is far cheaper than one for each name.
    text = "\n" + "\n".join(modules) + "\n"
    for entry in expand_modelopt(entries):
        if "\n" in entry:
            continue
        position = text.find(entry)
        while position >= 0:
            start, end = text.rfind("\n", 0, position + 1) + 1, text.find("\n", position)
            excluded.add(text[start:end])
            position = text.find(entry, end)
        if any(char in entry for char in "*?["):
            pattern = re.compile(translate(entry))
            excluded.update(module for module in modules if pattern.match(module))
    return excluded


def excluded_modules(dialect: str, modules: Sequence[str], entries: Iterable[str]) -> set[str]:
    """Those of `modules` that `entries` exclude, under the rules of a dialect."""
    if dialect == COMPRESSED_TENSORS.name:
        return excluded_by_compressed_tensors(modules, entries)
    return excluded_by_modelopt(modules, entries)


def taken_modules(claim: QuantizationClaim, mixed_layers: Iterable[str], modules: Sequence[str]) -> set[str]:
    """Those of `modules` that the config says are FP4, by checkpoint names.

    Args:
        claim: the config.
        mixed_layers: of mixed precision, the layers that are named as FP4; none for other configs.
        modules: all linears.
    """
    layers = set(mixed_layers)
    if layers:
        return taken_by_name(layers, modules)
    if claim.dialect == "auto-round":
        return _taken_by_auto_round(claim, modules)
    excluded = excluded_modules(claim.dialect, modules, claim.ignore)
    remaining = [module for module in modules if module not in excluded]
    if claim.dialect == COMPRESSED_TENSORS.name:
        return _targeted(claim, remaining)
    return set(remaining)


def taken_by_name(layers: set[str], modules: Iterable[str]) -> set[str]:
    """Modules that mixed precision names, alone or by a parent, such as ``…mlp.experts``."""
    patterns = [re.compile(translate(layer)) for layer in layers if "*" in layer]
    taken = set()
    for module in modules:
        parts = module.split(".")
        parents = (".".join(parts[: count + 1]) for count in range(len(parts)))
        if any(parent in layers for parent in parents) or any(p.match(module) for p in patterns):
            taken.add(module)
    return taken


def _targeted(claim: QuantizationClaim, modules: Sequence[str]) -> set[str]:
    groups = claim.raw.get("config_groups")
    targets: list[str] = []
    for group in groups.values() if isinstance(groups, dict) else ():
        listed = group.get("targets") if isinstance(group, dict) else None
        targets += [str(target) for target in listed] if isinstance(listed, list) else []
    if "Linear" in targets:
        return set(modules)
    return excluded_by_compressed_tensors(modules, targets)


def _taken_by_auto_round(claim: QuantizationClaim, modules: Sequence[str]) -> set[str]:
    blocks = claim.raw.get("block_name_to_quantize")
    names = blocks.split(",") if isinstance(blocks, str) else blocks if isinstance(blocks, list) else []
    prefixes = tuple(f"{str(name).strip()}." for name in names)
    extra = claim.raw.get("extra_config")
    wide = [
        name
        for name, info in (extra.items() if isinstance(extra, dict) else ())
        if isinstance(info, dict) and isinstance(info.get("bits"), int) and info["bits"] > 4
    ]
    excluded = excluded_by_compressed_tensors(modules, [*wide, *(REGEX_PREFIX + name for name in wide)])
    return {m for m in modules if m not in excluded and (not prefixes or m.startswith(prefixes))}


def _compiled(entry: str) -> re.Pattern[str] | None:
    if not entry.startswith(REGEX_PREFIX):
        return None
    try:
        return re.compile(entry.removeprefix(REGEX_PREFIX))
    except (re.error, RecursionError, OverflowError):
        return None
