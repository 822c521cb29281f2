"""The two dialects: what is stored, what the config says, and an ``ignore`` that covers exactly what stays wide."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import combinations

import pytest
from engine_names import VLLM, VLLM_OMNI, compressed_tensors_excludes, engine_module, modelopt_excludes
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, DIALECTS, MODELOPT, Activations, Dialect
from omnifp4.checkpoint.dialects.module_tree import wide_roots
from omnifp4.models import layout_for
from omnifp4.models.base import Kind, Layout, Part
from omnifp4.tiny.checkpoint import RELEASED_CONFIGS, released_config

BOTH = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
PRODUCER = {"name": "omnifp4", "version": "0"}


def facts(dialect: Dialect, activations: Activations) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in dialect.stored("m", (48, 64), activations)]


def test_stored_tensors() -> None:
    assert facts(MODELOPT, Activations.FP4) == [
        ("m.weight", "U8", (48, 32)),
        ("m.weight_scale", "F8_E4M3", (48, 4)),
        ("m.weight_scale_2", "F32", ()),
        ("m.input_scale", "F32", ()),
    ]
    assert facts(COMPRESSED_TENSORS, Activations.FP4) == [
        ("m.weight_packed", "U8", (48, 32)),
        ("m.weight_scale", "F8_E4M3", (48, 4)),
        ("m.weight_global_scale", "F32", (1,)),
        ("m.input_global_scale", "F32", (1,)),
    ]
    for dialect in DIALECTS.values():
        assert facts(dialect, Activations.WIDE) == facts(dialect, Activations.FP4)[:3]


def test_the_config_of_modelopt() -> None:
    wide = MODELOPT.quantization_config(Activations.WIDE, ["lm_head"], PRODUCER)
    assert (wide["quant_method"], wide["quant_algo"], wide["ignore"]) == ("modelopt", "W4A16_NVFP4", ["lm_head"])
    group = wide["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    assert not group["input_activations"]
    fp4 = MODELOPT.quantization_config(Activations.FP4, [], PRODUCER)
    assert fp4["quant_algo"] == "NVFP4"
    assert fp4["config_groups"]["group_0"]["input_activations"]["num_bits"] == 4
    assert fp4["producer"] == PRODUCER


def test_the_config_of_compressed_tensors() -> None:
    wide = COMPRESSED_TENSORS.quantization_config(Activations.WIDE, ["lm_head"], PRODUCER)
    stated = {key: wide[key] for key in ("quant_method", "format", "quantization_status", "ignore")}
    assert stated == {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
    }
    group = wide["config_groups"]["group_0"]
    number = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    assert group["targets"] == ["Linear"]
    assert group["weights"].items() >= number.items()
    assert group["input_activations"] is None
    fp4 = COMPRESSED_TENSORS.quantization_config(Activations.FP4, [], PRODUCER)["config_groups"]["group_0"]
    assert fp4["input_activations"]["dynamic"] == "local"


NAMES = st.lists(
    st.sampled_from(
        ["a", "ab", "b", "0", "1", "10", "layers", "gate", "gate_proj", "lm_head", "thinker", "talker", "mlp"]
    ),
    min_size=1,
    max_size=4,
).map(".".join)


def are_apart(names: frozenset[str]) -> bool:
    return not any(one.startswith(f"{other}.") or other.startswith(f"{one}.") for one, other in combinations(names, 2))


@BOTH
@settings(max_examples=400, deadline=None, derandomize=True)
@given(names=st.frozensets(NAMES, min_size=1, max_size=12).filter(are_apart), data=st.data())
def test_ignore_covers_exactly_what_is_wide(dialect: Dialect, names: frozenset[str], data: st.DataObject) -> None:
    """For any tree of modules, any part of it quantized."""
    wide = sorted(data.draw(st.sets(st.sampled_from(sorted(names)))))
    quantized = sorted(names.difference(wide))
    entries = dialect.ignore_entries(wide, quantized)
    assert [name for name in wide if not dialect.is_ignored(name, entries)] == []
    assert [name for name in quantized if dialect.is_ignored(name, entries)] == []


@BOTH
def test_a_module_inside_a_wide_linear_cannot_be_quantized(dialect: Dialect) -> None:
    for quantized in ("a.b", "a.b.c"):
        with pytest.raises(ValueError, match=r"a\.b: cannot stay wide"):
            dialect.ignore_entries(["a.b"], [quantized])


def test_roots_are_the_topmost_wide_modules() -> None:
    roots = wide_roots(["t.visual.0", "t.visual.1", "t.model.0.gate", "talker.x"], ["t.model.0.up"])
    assert [(root.name, root.is_leaf) for root in roots] == [
        ("t.visual", False),
        ("t.model.0.gate", True),
        ("talker", False),
    ]


def test_how_entries_match() -> None:
    assert MODELOPT.is_ignored("thinker.visual.blocks.0", ["thinker.visual*"])
    assert MODELOPT.is_ignored("thinker.visual", ["thinker.visual*"])
    assert MODELOPT.is_ignored("x.lm_head", ["lm_head"])
    assert not MODELOPT.is_ignored("x", [""])
    assert not MODELOPT.is_ignored("x.lm_head", ["re:.*lm_head"])
    assert MODELOPT.is_ignored("x", ["*"])
    assert COMPRESSED_TENSORS.is_ignored("x.lm_head", ["re:.*lm_head"])
    assert not COMPRESSED_TENSORS.is_ignored("x.lm_head", ["lm_head"])
    assert not COMPRESSED_TENSORS.is_ignored("thinker.visual.0", ["thinker.visual*"])
    assert not COMPRESSED_TENSORS.is_ignored("x.lm_head", ["re:lm_head"])


@pytest.fixture(scope="module")
def layout() -> Layout:
    return layout_for(released_config(next(iter(RELEASED_CONFIGS))), ())


CHOICES: dict[str, Callable[[Part, Kind], bool]] = {
    "default": lambda part, kind: part is Part.THINKER and kind in {Kind.ATTENTION, Kind.EXPERTS},
    "mlp": lambda part, kind: part is Part.THINKER and kind is Kind.EXPERTS,
    "thinker and talker": lambda part, kind: (
        part in {Part.THINKER, Part.TALKER} and kind in {Kind.ATTENTION, Kind.EXPERTS, Kind.SHARED_EXPERTS}
    ),
    "not the talker's attention": lambda part, kind: (
        (part is Part.THINKER and kind in {Kind.ATTENTION, Kind.EXPERTS})
        or (part is Part.TALKER and kind is Kind.EXPERTS)
    ),
    "not the thinker's attention": lambda part, kind: (
        (part in {Part.THINKER, Part.TALKER} and kind in {Kind.EXPERTS, Kind.SHARED_EXPERTS})
        or (part is Part.TALKER and kind is Kind.ATTENTION)
    ),
    "the talker alone": lambda part, kind: part is Part.TALKER and kind in {Kind.ATTENTION, Kind.EXPERTS},
}

ENGINES = {"vLLM": VLLM, "vLLM-Omni": VLLM_OMNI}
UNSEEN = (Part.AUDIO_TOWER, Part.CODE_PREDICTOR, Part.CODE2WAV)
"""Parts whose linears never ask whether they are quantized."""


@pytest.mark.parametrize("choice", CHOICES)
@BOTH
def test_engines_see_exactly_what_is_wide(layout: Layout, dialect: Dialect, choice: str) -> None:
    """The released 30B model under the names that engines give its modules, for several choices of components."""
    linears = [tensor for tensor in layout.tensors if tensor.is_linear]
    chosen = {t.module: CHOICES[choice](t.component.part, t.component.kind) for t in linears}
    wide = [module for module, is_chosen in chosen.items() if not is_chosen]
    quantized = [module for module, is_chosen in chosen.items() if is_chosen]
    begin = time.perf_counter()
    entries = dialect.ignore_entries(wide, quantized)
    assert time.perf_counter() - begin < 2
    assert len(entries) < 500
    excludes = modelopt_excludes if dialect is MODELOPT else compressed_tensors_excludes
    for engine, mapper in ENGINES.items():
        seen: dict[str, bool] = {}
        for tensor in linears:
            part = tensor.component.part
            if part in UNSEEN or (engine == "vLLM" and part is Part.TALKER):
                continue
            module = engine_module(tensor.module, mapper)
            if module not in seen:
                seen[module] = excludes(module, entries, mapper)
            assert seen[module] is not chosen[tensor.module], f"{engine}: {module}"
