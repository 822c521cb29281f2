"""Importing omnifp4's hook costs nothing, works in both orders, and leaves other checkpoints to Transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runtime_artifacts import changed

FP8_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    "input_activations": None,
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_installing_imports_nothing_heavy() -> None:
    code = (
        "from omnifp4.runtime import install; install(); import sys;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'numba') if m in sys.modules])"
    )
    assert run(code) == "[]"


@pytest.mark.parametrize("first", ["omnifp4", "transformers", "our own modules"])
def test_order_of_imports_does_not_matter(transformers: Any, first: str) -> None:
    lines = {
        "omnifp4": "from omnifp4.runtime import install; install(); import transformers.quantizers.auto as auto",
        "transformers": "import transformers.quantizers.auto as auto; from omnifp4.runtime import install; install()",
        "our own modules": (
            "from omnifp4.runtime import install; install(); import omnifp4.runtime.quantizer;"
            "import transformers.quantizers.auto as auto"
        ),
    }
    code = f"{lines[first]}; install(); print('modelopt' in auto.AUTO_QUANTIZER_MAPPING, auto.__spec__.loader.__class__.__name__)"
    assert run(code) == "True SourceFileLoader"


def test_registering_twice_changes_nothing(transformers: Any) -> None:
    from transformers.quantizers import auto

    from omnifp4.runtime import register

    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    register()
    assert before[0] == auto.AUTO_QUANTIZER_MAPPING
    assert before[1] == auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def claim(**changes: Any) -> dict[str, Any]:
    from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, Activations

    return COMPRESSED_TENSORS.quantization_config(Activations.WIDE, ["lm_head"], {}) | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "float-quantized", "config_groups": {"group_0": FP8_GROUP}},
        {"format": "pack-quantized"},
        {"transform_config": {"config_groups": {"R1": {}}}},
        {"config_groups": {}},
    ],
)
def test_other_compressed_tensors_go_to_transformers(
    transformers: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from omnifp4.runtime.claim import announces_nvfp4

    stated = claim(**changes)
    if changes.get("format") == "pack-quantized":
        stated["config_groups"]["group_0"].pop("format")
    assert announces_nvfp4(claim())
    assert not announces_nvfp4(stated)
    from transformers.quantizers import auto

    config_class = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"].__mro__[1]
    assert config_class.__name__ == "CompressedTensorsConfig"
    seen: list[Any] = []
    monkeypatch.setattr(config_class, "from_dict", classmethod(lambda cls, d, **k: seen.append((cls, d)) or "stock"))
    assert auto.AutoQuantizationConfig.from_dict(stated) == "stock"
    assert seen == [(config_class, stated)]


def test_unknown_model_types_go_to_transformers(
    transformers: Any, sibling: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed NVFP4 checkpoint of a model type that omnifp4 has no layout for is Transformers' to load or refuse."""
    from transformers.quantizers import auto

    stock = auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"].__mro__[1]
    config_class = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"].__mro__[1]
    assert stock.__name__ == "CompressedTensorsHfQuantizer"

    class Reached(Exception):
        pass

    def reached(self: Any, config: Any, **kwargs: Any) -> None:
        assert config == "stock config"
        raise Reached

    def become_mistral(config: dict[str, Any]) -> None:
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}

    folder = changed(sibling("llama"), tmp_path / "mistral", config=become_mistral)
    monkeypatch.setattr(config_class, "from_dict", classmethod(lambda cls, d, **k: "stock config"))
    monkeypatch.setattr(stock, "__init__", reached)
    with pytest.raises(Reached):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_torchvision_shim_acts_only_where_needed(transformers: Any) -> None:
    from omnifp4.runtime.torchvision_on_cpu import declare_missing_operators

    # Once it has acted, or where there is nothing to do, it does nothing.
    declare_missing_operators()
    assert declare_missing_operators().startswith("nothing: ")


def test_torchvision_imports_beside_a_cpu_torch() -> None:
    pytest.importorskip("torch")
    import importlib.util

    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    code = "from omnifp4.runtime import install; install(); import torchvision; print(torchvision.__name__)"
    assert run(code) == "torchvision"
