"""Asks vLLM's own configuration code what it would quantize, and compares with the tensors.

    python check_vllm_config.py [--allow-nameless-head] ARTIFACT...

For each artifact: vLLM must recognise the quantization_config; every module that vLLM
would build must be excluded exactly when the artifact holds it unquantized, and otherwise
be of the number format that its tensors are; and every ignore entry must match something. No model is built: module names come from the
checkpoint's tensor names, through vLLM's name mapper and its tables of fused modules.

vLLM (seen in 0.26 to 0.33) builds the head of Qwen3-Omni without a name, so no ignore
entry of a ModelOpt config can exclude it there. vLLM-Omni, compressed-tensors configs and
ModelOpt's MIXED_PRECISION, which names what is quantized, are not affected.
`--allow-nameless-head` reports that as a note instead of a failure.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tensors import Checkpoint, Usage, run


def let_torchvision_import() -> None:
    """Declares two torchvision operators where a CUDA torchvision meets a CPU torch.

    vLLM imports torchvision. PyPI's builds of it are CUDA builds whose library does not
    load beside a CPU torch; the import then stops at the missing operator schemas.
    """
    if torch.version.cuda is None and "+cpu" not in version("torchvision"):
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_torchvision_library"] = library  # the schemas live as long as this object


let_torchvision_import()

from engines import EMBEDDING, Stage, stages_of  # noqa: E402
from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.linear import ReplicatedLinear  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.utils import (  # noqa: E402
    should_ignore_layer,
)
from vllm.model_executor.layers.quantization.modelopt import (  # noqa: E402
    ModelOptMixedPrecisionConfig,
    ModelOptQuantConfigBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: E402

OVERRIDES = ("inc", "modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
PACKED = (".weight_packed", ".weight")
WIDE = ""
ALGORITHMS = {
    "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4", "FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "MXFP4": "mxfp4",
}  # fmt: skip
"""ModelOpt's algorithms and what weights are in them."""

UNREAD = {"mxfp4"}
UNREAD_EXPERTS = {"fp8"}
"""What no version of vLLM seen here reads from a ModelOpt config: told as a note."""


class Report:
    """Prints one line per check and counts the failures."""

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact.name
        self.failures = 0

    def line(self, passed: bool, subject: str, detail: str) -> None:
        """One check's outcome."""
        self.failures += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {self.artifact}: {subject}: {detail}")

    def note(self, subject: str, detail: str) -> None:
        """Something to know that decides nothing."""
        print(f"note {self.artifact}: {subject}: {detail}")


def recognise(config: dict[str, Any]) -> str:
    """The method that vLLM picks for a quantization_config, as its model config does."""
    for name in OVERRIDES:
        method = get_quantization_config(name).override_quantization_method(config, None)
        if method is not None:
            return str(method)
    return str(config.get("quant_method"))


def linears(artifact: Checkpoint) -> dict[str, str]:
    """Every linear of the artifact by checkpoint name, and the number format of its tensor; empty: wide."""
    found: dict[str, str] = {}
    for name in artifact.names():
        for suffix in PACKED:
            if name.endswith(suffix):
                module = name.removesuffix(suffix)
                packed = number_format(artifact, module, artifact.dtype(name))
                if (packed or artifact.rank(name) == 2) and not EMBEDDING.search(module):
                    found[module] = packed
                break
    return found


def number_format(artifact: Checkpoint, module: str, dtype: str) -> str:
    """What the codes of a linear are, by their type and that of their scales."""
    if dtype == "U8":
        scale = f"{module}.weight_scale"
        return "mxfp4" if scale in artifact and artifact.dtype(scale) == "U8" else "nvfp4"
    return {"F8_E4M3": "fp8", "I32": "int8", "I8": "int8"}.get(dtype, WIDE)


def stand_in(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """An empty layer of a vLLM class: the configs look only at its class."""
    return kind.__new__(kind)


def quantizes(config: QuantizationConfig, name: str, *, head: bool) -> str:
    """The number format as which vLLM would build the module `name`; empty: wide.

    Raises:
        ValueError: vLLM refuses a fused module of which only some parts are excluded.
    """
    if isinstance(config, ModelOptMixedPrecisionConfig):
        algorithm = None if config.is_layer_excluded(name) else config._resolve_quant_algo(name)
        return WIDE if algorithm is None else ALGORITHMS.get(algorithm, algorithm)
    if isinstance(config, ModelOptQuantConfigBase):
        return WIDE if config.is_layer_excluded(name) else "nvfp4"
    if name.endswith(".experts"):
        # As CompressedTensorsMoEMethod.get_moe_method does: expert 0 speaks for all.
        config._add_fused_moe_to_target_scheme_map()
        layer = stand_in(RoutedExperts)
        shards = (f"{name}.0.{part}_proj" for part in ("gate", "up", "down"))
        answers = {told(config.get_scheme_dict(layer, shard)) for shard in shards}
        if len(answers) != 1:
            raise ValueError("the projections of expert 0 have different schemes")
        return answers.pop()
    layer = stand_in(ParallelLMHead if head else ReplicatedLinear)
    return told(config.get_scheme_dict(layer, name))


def told(scheme: dict[str, Any] | None) -> str:
    """The number format of the weights in a scheme of compressed-tensors as vLLM has parsed it."""
    if scheme is None:
        return WIDE
    weights = scheme["weights"]
    kind = (weights.num_bits, str(getattr(weights.type, "value", weights.type)), weights.group_size)
    formats = {
        (4, "float", 16): "nvfp4",
        (4, "float", 32): "mxfp4",
        (8, "float", None): "fp8",
        (8, "int", None): "int8",
    }
    return formats.get(kind, str(kind))


def ignores(config: QuantizationConfig, name: str) -> bool:
    """Whether the config's ignore entries match the module `name`, in whole or in part."""
    try:
        if isinstance(config, ModelOptQuantConfigBase):
            return bool(config.is_layer_excluded(name))
        return bool(should_ignore_layer(name, config.ignore, config.packed_modules_mapping))
    except ValueError:  # some parts of a fused module, which does match
        return True


def parse(raw: dict[str, Any], stage: Stage | None = None) -> QuantizationConfig:
    """The config as vLLM parses it and, for a stage, renamed and told of its fused modules.

    Raises:
        ValueError: vLLM refuses the config.
        Usage: vLLM reads the config, but this check cannot question its method.
    """
    method = recognise(raw)
    config = get_quantization_config(method).from_config(copy.deepcopy(raw))
    if not isinstance(config, ModelOptQuantConfigBase | CompressedTensorsConfig):
        raise Usage(f"quant method {method!r}: this check knows ModelOpt and compressed-tensors")
    if stage is not None:
        config.apply_vllm_mapper(stage.entries)
        config.packed_modules_mapping = stage.packed
    return config


def check_stage(report: Report, stage: Stage, raw: dict[str, Any], tensors: dict[str, str], allow_head: bool) -> None:
    """Compares, for one stage, what vLLM would quantize with what the tensors are."""
    config = parse(raw, stage)
    if isinstance(config, ModelOptMixedPrecisionConfig) and stage.title.startswith("vllm-omni 0.26"):
        report.note(stage.title, "renames quantized_layers to names that its modules do not have: it reads none of it")
        return
    groups: dict[str, dict[str, str]] = {}
    head_names: set[str] = set()
    for module, kind in tensors.items():
        name = stage.name(module)
        if name is None:
            continue
        if stage.is_head(module):
            name = name if stage.head is None else stage.head
            head_names.add(name)
        groups.setdefault(stage.fused(name), {})[module] = kind

    agreed = 0
    before = report.failures
    for name, parts in sorted(groups.items()):
        subject = f"{stage.title}: {name or '(nameless head)'}"
        if len(set(parts.values())) != 1:
            report.line(False, subject, f"partly {' and '.join(sorted({kind or 'wide' for kind in parts.values()}))}")
            continue
        kind = next(iter(parts.values()))
        if isinstance(config, ModelOptMixedPrecisionConfig) and (
            kind in UNREAD or (kind in UNREAD_EXPERTS and name.endswith(".experts"))
        ):
            report.note(subject, f"vLLM does not read {kind} here from a ModelOpt config")
            continue
        if stage.unasked.search(name):
            if kind:
                report.line(False, subject, f"{kind}, but the engine builds it unquantized")
            agreed += not kind
            continue
        try:
            wanted = quantizes(config, name, head=name in head_names)
        except ValueError as error:
            report.line(False, subject, f"vLLM refuses it: {error}")
            continue
        if wanted == kind:
            agreed += 1
        elif name == "" and wanted and allow_head:
            report.note(subject, f"vLLM expects {wanted} here, and no ignore entry can say otherwise")
        else:
            report.line(False, subject, f"{wanted or 'excluded'} by the config, {kind or 'wide'} in the tensors")
    if report.failures == before:
        report.line(True, stage.title, f"{agreed} of {len(groups)} modules as the tensors are")


def matches(raw: dict[str, Any], entry: str, stages: Iterable[Stage], modules: Iterable[str]) -> bool:
    """Whether one ignore entry, taken alone, matches any of the modules in any stage."""
    modules = list(modules)
    for stage in stages:
        config = parse({**raw, "ignore": [entry]}, stage)
        names = {name for module in modules if (name := stage.name(module)) is not None}
        names |= {stage.fused(name) for name in names}
        if any(ignores(config, name) for name in names):
            return True
    return False


def check_artifact(path: Path, allow_head: bool) -> int:
    """Runs every check on one artifact; returns the number of failures."""
    artifact = Checkpoint(path)
    raw = artifact.quantization_config()
    report = Report(path)
    try:
        parsed = parse(raw)
        stages = stages_of(json.loads((path / "config.json").read_text()))
    except ValueError as error:
        report.line(False, "recognised", f"vLLM refuses it: {error}")
        return report.failures
    detail = getattr(parsed, "quant_method", None) or getattr(parsed, "quant_format", "")
    report.line(True, "recognised", f"{recognise(raw)} {detail}".strip())

    tensors = linears(artifact)
    quantized = sum(bool(kind) for kind in tensors.values())
    kinds = ", ".join(sorted({kind for kind in tensors.values() if kind}))
    report.line(quantized > 0, "tensors", f"{quantized} of {len(tensors)} linears are {kinds}")
    for stage in stages:
        check_stage(report, stage, raw, tensors, allow_head)

    modules = sorted({name.rpartition(".")[0] for name in artifact.names()})
    entries: list[str] = raw.get("ignore", [])
    useless = [entry for entry in entries if not matches(raw, entry, stages, modules)]
    for entry in useless:
        report.line(False, "ignore", f"{entry!r} matches nothing")
    if not useless:
        report.line(True, "ignore", f"each of {len(entries)} entries matches something")
    return report.failures


def check(arguments: list[str]) -> int:
    """Runs the check on `[--allow-nameless-head] ARTIFACT...`; returns the failures."""
    allow_head = "--allow-nameless-head" in arguments
    paths = [argument for argument in arguments if argument != "--allow-nameless-head"]
    if not paths or any(path.startswith("-") for path in paths):
        raise Usage("usage: check_vllm_config.py [--allow-nameless-head] ARTIFACT...")
    return sum(check_artifact(Path(path), allow_head) for path in paths)


if __name__ == "__main__":
    run(check, sys.argv[1:])
