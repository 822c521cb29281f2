"""The compressed-tensors dialect (``nvfp4-pack-quantized``): the tensor scale is stored as reciprocal, shape ``[1]``.

``ignore`` entries are exact module names, or ``re:`` and a regular expression matched from the start of the name.
Engines rename modules (``thinker.visual`` is ``visual`` in vLLM) and do not rename inside expressions, so what is
written here matches by the end of the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from omnifp4.checkpoint.dialects.base import Activations
from omnifp4.checkpoint.dialects.coded import CodedForm, StoredTensor
from omnifp4.checkpoint.dialects.module_tree import WideRoot, wide_roots
from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.formats.scheme import Scheme

REGEX_PREFIX: Final = "re:"
DROPPED_PARTS: Final = ("thinker",)
"""First parts of names that engines drop, so that no expression may count on them."""


MIXED_PRECISION: Final = "mixed-precision"

FORMATS: Final[Mapping[Scheme, str]] = {
    Scheme.NVFP4: "nvfp4-pack-quantized",
    Scheme.MXFP4: "mxfp4-pack-quantized",
    Scheme.FP8: "float-quantized",
    Scheme.INT8: "pack-quantized",
}
"""What the dialect calls the layout of each scheme."""

_STATIC: Final = {"symmetric": True, "dynamic": False}

WEIGHTS: Final[Mapping[Scheme, Mapping[str, Any]]] = {
    Scheme.NVFP4: {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK_SIZE, **_STATIC},
    Scheme.MXFP4: {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": Scheme.MXFP4.block_size,
        **_STATIC,
        "scale_dtype": "torch.uint8",
    },
    Scheme.FP8: {"num_bits": 8, "type": "float", "strategy": "channel", **_STATIC},
    Scheme.INT8: {"num_bits": 8, "type": "int", "strategy": "channel", **_STATIC},
}
"""What the dialect says of the weights of each scheme."""


class _Kind(NamedTuple):
    """What one config group holds."""

    scheme: Scheme
    rounds_inputs: bool = False


def _input_activations(kind: _Kind, activations: Activations) -> dict[str, Any] | None:
    if kind.rounds_inputs:
        return {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    if kind.scheme is Scheme.NVFP4 and activations is Activations.FP4:
        return {**WEIGHTS[Scheme.NVFP4], "dynamic": "local"}
    return None


class CompressedTensors:
    """See `Dialect`."""

    name = "compressed-tensors"
    packed_suffix = ".weight_packed"
    block_scale_suffix = ".weight_scale"
    tensor_scale_suffix = ".weight_global_scale"
    input_scale_suffix = ".input_global_scale"
    reciprocal = True
    coded_forms: Mapping[Scheme, CodedForm] = {
        Scheme.FP8: CodedForm(".weight", "F8_E4M3", ".weight_scale", "F32", scale_is_column=True),
        Scheme.MXFP4: CodedForm(".weight_packed", "U8", ".weight_scale", "U8"),
        Scheme.INT8: CodedForm(
            ".weight_packed", "I32", ".weight_scale", "BF16", scale_is_column=True, shape_suffix=".weight_shape"
        ),
    }

    def stored(
        self, module: str, shape: tuple[int, int], activations: Activations, scheme: Scheme = Scheme.NVFP4
    ) -> tuple[StoredTensor, ...]:
        """See `Dialect.stored`; scalars have shape ``[1]``."""
        rows, columns = shape
        if scheme is not Scheme.NVFP4:
            return self.coded_forms[scheme].stored(module, shape)
        tensors = [
            StoredTensor(module + self.packed_suffix, "U8", (rows, columns // 2)),
            StoredTensor(module + self.block_scale_suffix, "F8_E4M3", (rows, columns // BLOCK_SIZE)),
            StoredTensor(module + self.tensor_scale_suffix, "F32", (1,)),
        ]
        if activations is Activations.FP4:
            tensors.append(StoredTensor(module + self.input_scale_suffix, "F32", (1,)))
        return tuple(tensors)

    def quantization_config(
        self,
        activations: Activations,
        ignore: Sequence[str],
        producer: Mapping[str, str],
        schemes: Mapping[str, Scheme] | None = None,
    ) -> dict[str, Any]:
        """See `Dialect.quantization_config`.

        One group for each scheme; where there are several, their targets are expressions that tell them apart. FP8
        experts are a group of their own, with inputs that are rounded token by token: engines have no other kernels
        for them. That needs no data, and nothing of it is stored.
        """
        kinds: dict[_Kind, list[str]] = {}
        for module, scheme in (schemes or {}).items():
            kinds.setdefault(_Kind(scheme, scheme is Scheme.FP8 and ".experts." in module), []).append(module)
        if not kinds:
            kinds[_Kind(Scheme.NVFP4)] = []
        groups = {}
        for number, (kind, modules) in enumerate(kinds.items()):
            others = [module for other, its in kinds.items() if other != kind for module in its]
            groups[f"group_{number}"] = {
                "targets": self.ignore_entries(modules, others) if others else ["Linear"],
                "weights": dict(WEIGHTS[kind.scheme]),
                "input_activations": _input_activations(kind, activations),
                "output_activations": None,
                "format": FORMATS[kind.scheme],
            }
        forms = list(dict.fromkeys(FORMATS[kind.scheme] for kind in kinds))
        return {
            "quant_method": "compressed-tensors",
            "format": forms[0] if len(forms) == 1 else MIXED_PRECISION,
            "quantization_status": "compressed",
            "config_groups": groups,
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
