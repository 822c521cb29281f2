"""Which modules a quantization_config takes for FP4, for tens of thousands of modules at once.

It answers as `Dialect.is_ignored` does for one module at a time; a test holds the two together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import translate
from typing import Any, Final

from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, QuantizationClaim
from omnifp4.formats.scheme import Scheme

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


ALGORITHM_SCHEMES: Final[Mapping[str, Scheme]] = {
    "NVFP4": Scheme.NVFP4,
    "W4A16_NVFP4": Scheme.NVFP4,
    "FP8": Scheme.FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme.FP8,
    "MXFP4": Scheme.MXFP4,
    "W8A16": Scheme.INT8,
}
"""What ModelOpt's names of algorithms say of the weights."""


def group_scheme(group: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a config group of compressed-tensors asks for; None for one that is unknown here."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        return None
    bits, kind, size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    if (bits, kind) == (4, "float"):
        return Scheme.MXFP4 if size == Scheme.MXFP4.block_size else Scheme.NVFP4
    if bits != 8:
        return None
    return Scheme.FP8 if kind == "float" else Scheme.INT8 if kind == "int" else None


def said_schemes(
    claim: QuantizationClaim, mixed_layers: Mapping[str, str], modules: Sequence[str]
) -> dict[str, Scheme | None]:
    """The scheme that the config says of each of `modules` that it does not leave wide, by checkpoint names.

    Args:
        claim: the config.
        mixed_layers: of mixed precision, the algorithm of each layer that is named; none for other configs.
        modules: all linears.

    Returns:
        None for a scheme that is not known here.
    """
    if mixed_layers:
        said: dict[str, Scheme | None] = {}
        for scheme, layers in layers_by_scheme(mixed_layers).items():
            said.update(dict.fromkeys(taken_by_name(layers, modules), scheme))
        return said
    if claim.dialect == "auto-round":
        return dict.fromkeys(_taken_by_auto_round(claim, modules), Scheme.NVFP4)
    excluded = excluded_modules(claim.dialect, modules, claim.ignore)
    remaining = [module for module in modules if module not in excluded]
    if claim.dialect == COMPRESSED_TENSORS.name:
        return targeted(claim, remaining)
    algorithm = str(claim.raw.get("quant_algo", "")).upper()
    # What a config with an unknown algorithm says is judged elsewhere; here it means what its tensors mostly are.
    return dict.fromkeys(remaining, ALGORITHM_SCHEMES.get(algorithm, Scheme.NVFP4))


def layers_by_scheme(mixed_layers: Mapping[str, str]) -> dict[Scheme | None, set[str]]:
    """Names of layers by what their algorithm means; None for algorithms that are unknown here."""
    found: dict[Scheme | None, set[str]] = {}
    for layer, algorithm in mixed_layers.items():
        found.setdefault(ALGORITHM_SCHEMES.get(algorithm), set()).add(layer)
    return found


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


def targeted(claim: QuantizationClaim, modules: Sequence[str], *, classes: bool = True) -> dict[str, Scheme | None]:
    """The scheme of each of `modules` that a group targets: by its name first, then, with `classes`, as any linear."""
    said: dict[str, Scheme | None] = {}
    every: list[Scheme | None] = []
    for targets, scheme in _groups(claim):
        for module in excluded_by_compressed_tensors(modules, targets):
            said.setdefault(module, scheme)
        if classes and "Linear" in targets:
            every.append(scheme)
    if every:
        for module in modules:
            said.setdefault(module, every[0])
    return said


def _groups(claim: QuantizationClaim) -> Iterator[tuple[list[str], Scheme | None]]:
    groups = claim.raw.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        listed = group.get("targets") if isinstance(group, dict) else None
        if isinstance(listed, list):
            yield [str(target) for target in listed], group_scheme(group)


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
