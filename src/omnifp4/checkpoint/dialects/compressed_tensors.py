"""The compressed-tensors dialect (``nvfp4-pack-quantized``): the tensor scale is stored as reciprocal, shape ``[1]``.

``ignore`` entries are exact module names, or ``re:`` and a regular expression matched from the start of the name.
Engines rename modules (``thinker.visual`` is ``visual`` in vLLM) and do not rename inside expressions, so what is
written here matches by the end of the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from omnifp4.checkpoint.dialects.base import Activations, StoredTensor
from omnifp4.checkpoint.dialects.module_tree import WideRoot, wide_roots
from omnifp4.formats.nvfp4 import BLOCK_SIZE

REGEX_PREFIX: Final = "re:"
DROPPED_PARTS: Final = ("thinker",)
"""First parts of names that engines drop, so that no expression may count on them."""


class CompressedTensors:
    """See `Dialect`."""

    name = "compressed-tensors"
    packed_suffix = ".weight_packed"
    block_scale_suffix = ".weight_scale"
    tensor_scale_suffix = ".weight_global_scale"
    input_scale_suffix = ".input_global_scale"
    reciprocal = True

    def stored(self, module: str, shape: tuple[int, int], activations: Activations) -> tuple[StoredTensor, ...]:
        """See `Dialect.stored`; scalars have shape ``[1]``."""
        rows, columns = shape
        tensors = [
            StoredTensor(module + self.packed_suffix, "U8", (rows, columns // 2)),
            StoredTensor(module + self.block_scale_suffix, "F8_E4M3", (rows, columns // BLOCK_SIZE)),
            StoredTensor(module + self.tensor_scale_suffix, "F32", (1,)),
        ]
        if activations is Activations.FP4:
            tensors.append(StoredTensor(module + self.input_scale_suffix, "F32", (1,)))
        return tuple(tensors)

    def quantization_config(
        self, activations: Activations, ignore: Sequence[str], producer: Mapping[str, str]
    ) -> dict[str, Any]:
        """See `Dialect.quantization_config`."""
        number = {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": BLOCK_SIZE,
            "symmetric": True,
            "dynamic": False,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": number,
                    "input_activations": {**number, "dynamic": "local"} if activations is Activations.FP4 else None,
                    "output_activations": None,
                    "format": "nvfp4-pack-quantized",
                }
            },
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def ignore_entries(self, wide: Iterable[str], quantized: Iterable[str]) -> list[str]:
        """See `Dialect.ignore_entries`: the shortest ends of names that no quantized module shares."""
        wide = tuple(wide)
        quantized = tuple(quantized)
        sharing = _Sharing(quantized)
        entries: list[str] = []
        for root in wide_roots(wide, quantized, DROPPED_PARTS):
            pattern = _shortest_tail(root, sharing) or _tail_within_part(root, sharing, wide)
            # Where no end of the name tells it apart there remain exact names, which engines rename themselves.
            entries += [REGEX_PREFIX + pattern] if pattern else _under(root, wide)
        return list(dict.fromkeys(entries))

    def is_ignored(self, module: str, entries: Sequence[str]) -> bool:
        """See `Dialect.is_ignored`."""
        return any(matches(module, entry) for entry in entries)


def matches(module: str, entry: str) -> bool:
    """Whether one entry excludes one module."""
    if entry.startswith(REGEX_PREFIX):
        return re.match(entry.removeprefix(REGEX_PREFIX), module) is not None
    return entry == module


class _Sharing:
    """Which quantized modules an expression matches, remembered: layer after layer asks the same."""

    def __init__(self, quantized: Sequence[str]) -> None:
        self._quantized = quantized
        self._parts: dict[str, tuple[str, ...]] = {}

    def parts(self, pattern: str) -> tuple[str, ...]:
        """First parts of the names that match, sorted."""
        if pattern not in self._parts:
            matching = re.compile(pattern).match
            self._parts[pattern] = tuple(
                sorted({module.partition(".")[0] for module in self._quantized if matching(module)})
            )
        return self._parts[pattern]


def _under(root: WideRoot, modules: Iterable[str]) -> list[str]:
    return [module for module in modules if module == root.name or module.startswith(f"{root.name}.")]


def _tails(root: WideRoot) -> Iterator[str]:
    """Expressions for ever longer ends of a name, up to all but its first part; for a single part, the part."""
    parts = root.name.split(".")
    fewest = 2 if root.is_leaf and len(parts) > 2 else 1
    for count in range(fewest, max(len(parts), 2)):
        tail = parts[-count:]
        if not tail[0].isdigit():
            # Engines may drop or add parts in front, so the tail may also be the whole name.
            yield r"(.*\.)?" + re.escape(".".join(tail)) + ("$" if root.is_leaf else r"\..*")


def _shortest_tail(root: WideRoot, sharing: _Sharing) -> str | None:
    return next((tail for tail in _tails(root) if not sharing.parts(tail)), None)


def _tail_within_part(root: WideRoot, sharing: _Sharing, wide: Sequence[str]) -> str | None:
    """An expression for a tail that quantized modules of other parts (such as the talker) have as well."""
    part, _, below = root.name.partition(".")
    if not below:
        return None
    for tail in _tails(root):
        others = sharing.parts(tail)
        if part in others:
            continue
        if part in DROPPED_PARTS:
            pattern = rf"(?!(.*\.)?({'|'.join(map(re.escape, others))})\.)" + tail
        else:
            pattern = rf"(.*\.)?{re.escape(part)}\." + tail
        if not sharing.parts(pattern) and all(re.match(pattern, module) for module in _under(root, wide)):
            return pattern
    return None
