"""The ModelOpt dialect: ``X.weight`` holds the codes, ``X.weight_scale_2`` is the tensor scale as a factor.

``ignore`` entries are names with ``*``; vLLM takes an entry for a match if it equals the module's name, occurs inside
it, or matches it as a wildcard (`modelopt.py: is_layer_excluded`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

from omnifp4.checkpoint.dialects.base import Activations
from omnifp4.checkpoint.dialects.coded import CodedForm, StoredTensor
from omnifp4.checkpoint.dialects.module_tree import wide_roots
from omnifp4.errors import RecipeError
from omnifp4.formats.nvfp4 import BLOCK_SIZE
from omnifp4.formats.scheme import Scheme

ALGORITHMS: Final = {Activations.WIDE: "W4A16_NVFP4", Activations.FP4: "NVFP4"}
MIXED_PRECISION: Final = "MIXED_PRECISION"

CODED_ALGORITHMS: Final[Mapping[Scheme, Mapping[str, Any]]] = {
    Scheme.FP8: {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    Scheme.MXFP4: {"quant_algo": "MXFP4", "group_size": Scheme.MXFP4.block_size},
}
"""What ``quantized_layers`` says of a module. INT8 has the name W8A16, which is not written: engines take a module of
an algorithm that they do not know for a wide one, and would load its integers as weights."""


class ModelOpt:
    """See `Dialect`."""

    name = "modelopt"
    packed_suffix = ".weight"
    block_scale_suffix = ".weight_scale"
    tensor_scale_suffix = ".weight_scale_2"
    input_scale_suffix = ".input_scale"
    reciprocal = False
    coded_forms: Mapping[Scheme, CodedForm] = {
        Scheme.FP8: CodedForm(".weight", "F8_E4M3", ".weight_scale", "F32"),
        Scheme.MXFP4: CodedForm(".weight", "U8", ".weight_scale", "U8"),
    }

    def stored(
        self, module: str, shape: tuple[int, int], activations: Activations, scheme: Scheme = Scheme.NVFP4
    ) -> tuple[StoredTensor, ...]:
        """See `Dialect.stored`; scalars have shape ``[]``."""
        rows, columns = shape
        if scheme is not Scheme.NVFP4:
            return self._form(scheme).stored(module, shape)
        tensors = [
            StoredTensor(module + self.packed_suffix, "U8", (rows, columns // 2)),
            StoredTensor(module + self.block_scale_suffix, "F8_E4M3", (rows, columns // BLOCK_SIZE)),
            StoredTensor(module + self.tensor_scale_suffix, "F32", ()),
        ]
        if activations is Activations.FP4:
            tensors.append(StoredTensor(module + self.input_scale_suffix, "F32", ()))
        return tuple(tensors)

    def quantization_config(
        self,
        activations: Activations,
        ignore: Sequence[str],
        producer: Mapping[str, str],
        schemes: Mapping[str, Scheme] | None = None,
    ) -> dict[str, Any]:
        """See `Dialect.quantization_config`. No hf_quant_config.json goes with it: vLLM refuses W4A16_NVFP4 there."""
        if schemes and any(scheme is not Scheme.NVFP4 for scheme in schemes.values()):
            return self._mixed_config(activations, ignore, producer, schemes)
        number = {"num_bits": 4, "type": "float", "group_size": BLOCK_SIZE, "dynamic": False}
        return {
            "quant_method": "modelopt",
            "quant_algo": ALGORITHMS[activations],
            "group_size": BLOCK_SIZE,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": number,
                    "input_activations": number if activations is Activations.FP4 else None,
                }
            },
            "ignore": list(ignore),
            "producer": dict(producer),
        }

    def _mixed_config(
        self,
        activations: Activations,
        ignore: Sequence[str],
        producer: Mapping[str, str],
        schemes: Mapping[str, Scheme],
    ) -> dict[str, Any]:
        """Every module by name, with its algorithm."""
        nvfp4 = {"quant_algo": ALGORITHMS[activations], "group_size": BLOCK_SIZE}
        return {
            "quant_method": "modelopt",
            "quant_algo": MIXED_PRECISION,
            "quantized_layers": {
                module: dict(nvfp4 if scheme is Scheme.NVFP4 else CODED_ALGORITHMS[scheme])
                for module, scheme in schemes.items()
            },
            "ignore": list(ignore),
            "producer": dict(producer),
        }

    def _form(self, scheme: Scheme) -> CodedForm:
        if scheme not in self.coded_forms:
            raise RecipeError(
                f"format {self.name} has no form of {scheme} that an engine reads; it has nvfp4, "
                f"{', '.join(self.coded_forms)}",
                hint="choose --format compressed-tensors",
            )
        return self.coded_forms[scheme]

    def ignore_entries(self, wide: Iterable[str], quantized: Iterable[str]) -> list[str]:
        """See `Dialect.ignore_entries`; an entry that occurs inside a quantized name is written so that it does not."""
        quantized = tuple(quantized)
        entries: list[str] = []
        for root in wide_roots(wide, quantized):
            # Engines may drop the first part, and look for what is left.
            renamed = root.name.partition(".")[2] or root.name
            is_inside = any(renamed in module for module in quantized)
            if is_inside and root.name.endswith(".lm_head"):
                # vLLM-Omni puts a part before the head's name, and renames only what is spelled out.
                entries.append(f"{root.name.removesuffix('.lm_head')}*.lm_head")
            elif root.is_leaf:
                entries.append(f"{root.name[:-1]}[{root.name[-1]}]" if is_inside else root.name)
            else:
                entries.append(f"{root.name}.*" if is_inside else f"{root.name}*")
            if root.name.endswith(".lm_head") and not any("lm_head" in module for module in quantized):
                entries.append("lm_head")
        return entries

    def is_ignored(self, module: str, entries: Sequence[str]) -> bool:
        """See `Dialect.is_ignored`."""
        return any(matches(module, entry) for entry in entries)


def matches(module: str, entry: str) -> bool:
    """Whether one entry excludes one module."""
    if len(entry) > 1 and entry.endswith("*") and not entry.endswith(".*"):
        stem = entry[:-1]
        return matches(module, stem) or matches(module, stem + ".*")
    return entry != "" and (entry in module or fnmatchcase(module, entry))
