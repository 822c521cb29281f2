"""What does not match is an error that names it; nothing is loaded with a warning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_artifacts import changed

from omnifp4.errors import CheckpointError, OmniFP4Error
from small_checkpoints import Tensor, Tensors, from_values

LINEAR = "thinker.model.layers.1.self_attn.o_proj"
EXPERT = "thinker.model.layers.2.mlp.experts.5"
TALKER_EXPERT = "talker.model.layers.0.mlp.experts.3"


def remove(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name])

    return edit


def add(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def fill_first_byte(value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        bits = tensor.bits.copy()
        bits.reshape(-1)[0] = value
        return Tensor(tensor.dtype, bits)

    return change


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: Tensor(tensor.dtype, (tensor.bits * np.float32(factor)).astype(np.float32))


FAULTS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no block scale": (remove(f"{LINEAR}.weight_scale"), rf"{LINEAR}\.weight_scale' is missing"),
    "no tensor scale": (remove(f"{LINEAR}.weight_scale_2"), rf"{LINEAR}\.weight_scale_2' is missing"),
    "no codes": (remove(f"{LINEAR}.weight"), rf"{LINEAR}\.weight_scale.*' belongs to no packed weight"),
    "no expert": (
        remove(
            *(
                f"{EXPERT}.{p}_proj.{s}"
                for p in ("gate", "up", "down")
                for s in ("weight", "weight_scale", "weight_scale_2")
            )
        ),
        rf"packed weight of '{EXPERT}.gate_proj' is missing",
    ),
    "no up of an expert": (
        remove(*(f"{EXPERT}.up_proj.{s}" for s in ("weight", "weight_scale", "weight_scale_2"))),
        rf"packed weight of '{EXPERT}.up_proj' is missing",
    ),
    "a scale of an expert": (
        remove(f"{EXPERT}.down_proj.weight_scale"),
        rf"{EXPERT}\.down_proj\.weight_scale' is missing",
    ),
    "gate and up differ": (put(f"{EXPERT}.up_proj.weight_scale_2", times(2)), "must share one tensor scale"),
    "q and k differ": (put("thinker.model.layers.0.self_attn.k_proj.weight_scale_2", times(1.5)), "must share one"),
    "zero tensor scale": (put(f"{LINEAR}.weight_scale_2", times(0)), rf"{LINEAR}\.weight_scale_2' is 0"),
    "negative tensor scale": (put(f"{LINEAR}.weight_scale_2", times(-1)), "must be positive and finite"),
    "NaN tensor scale": (put(f"{LINEAR}.weight_scale_2", times(float("nan"))), "must be positive and finite"),
    "NaN block scale": (
        put(f"{EXPERT}.gate_proj.weight_scale", fill_first_byte(0x7F)),
        "block scales of .*experts' are NaN",
    ),
    "short codes": (put(f"{LINEAR}.weight", lambda t: Tensor("U8", t.bits[:-16])), "weight_scale' is F8_E4M3 .*, not"),
    "wrong shape": (
        lambda tensors: (
            put(f"{LINEAR}.weight", lambda t: Tensor("U8", t.bits[:-16].copy()))(tensors),
            put(f"{LINEAR}.weight_scale", lambda t: Tensor(t.dtype, t.bits[:-16].copy()))(tensors),
            None,
        )[-1],
        rf"{LINEAR}\.weight' holds a weight of .* where the model has",
    ),
    "scale of another type": (
        put(f"{LINEAR}.weight_scale", lambda t: from_values(t.values)),
        rf"{LINEAR}\.weight_scale' is BF16",
    ),
    "packed where there is nothing": (
        lambda tensors: tensors.update(
            {n.replace("layers.1.", "layers.9."): t for n, t in list(tensors.items()) if n.startswith(f"{LINEAR}.")}
        ),
        r"layers\.9\.self_attn\.o_proj.* is no module in the model",
    ),
    "one expert too many": (
        lambda tensors: tensors.update(
            {n.replace("experts.5.", "experts.8."): t for n, t in list(tensors.items()) if n.startswith(f"{EXPERT}.")}
        ),
        r"experts\.8' exceeds the 8 of the model",
    ),
    "packed and wide": (
        lambda tensors: tensors.update({"model.layers.1.self_attn.o_proj.weight": from_values(np.zeros((256, 256)))}),
        "has no place in the model|there twice",
    ),
    "no wide tensor": (
        remove("thinker.model.norm.weight"),
        r"no tensor for 'thinker\.model\..*norm\.weight' of the model",
    ),
    "no wide expert": (
        remove(f"{TALKER_EXPERT}.down_proj.weight"),
        r"3 tensors for 'talker\.model\.layers\.0.*down_proj",
    ),
    "wide tensor of another shape": (
        put("thinker.model.norm.weight", lambda t: Tensor(t.dtype, t.bits[:-1].copy())),
        r"thinker\.model\.norm\.weight' is \[\d+\] where the model has",
    ),
    "unknown wide tensor": (
        add("thinker.model.extra.weight", from_values(np.zeros(3))),
        r"extra\.weight' has no place",
    ),
    "calibration left behind": (
        add(f"{LINEAR}.weight_quantizer._amax", from_values(np.ones(1))),
        "_amax' belongs to no packed weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged(transformers: Any, artifact: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    edit, message = FAULTS[fault]
    folder = changed(artifact(), tmp_path / "damaged", edit)
    with pytest.raises(CheckpointError, match=message):
        transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder)


def test_some_input_scales(transformers: Any, artifact: Callable[..., Path], tmp_path: Path) -> None:
    scale = Tensor("F32", np.array(0.5, dtype=np.float32))
    folder = changed(artifact(), tmp_path / "one", add(f"{EXPERT}.gate_proj.input_scale", scale))
    with pytest.raises(CheckpointError, match="has no input scale though other experts have one"):
        transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("how", ["from_pretrained", "load"])
def test_float16_is_explained(transformers: Any, artifact: Callable[..., Path], how: str) -> None:
    import torch

    from omnifp4.runtime import load

    with pytest.raises(OmniFP4Error, match=r"float16 was asked for.*quantized.*dtype='auto'"):
        if how == "load":
            load(artifact(), dtype="float16")
        else:
            transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(artifact(), dtype=torch.float16)


def test_unknown_dtype_and_backend(transformers: Any, artifact: Callable[..., Path]) -> None:
    from omnifp4.runtime import load

    with pytest.raises(OmniFP4Error, match="dtype 'float15' is unknown"):
        load(artifact(), dtype="float15")
    with pytest.raises(OmniFP4Error, match="backend 'abacus' is unknown; known are auto, compiled-cpu, triton, torch"):
        load(artifact(), backend="abacus")


def test_an_algorithm_that_is_not_nvfp4(transformers: Any, artifact: Callable[..., Path], tmp_path: Path) -> None:
    def claim_fp8(config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_algo"] = "FP8"

    folder = changed(artifact(), tmp_path / "fp8", config=claim_fp8)
    with pytest.raises(CheckpointError, match="quant_algo 'FP8' cannot be run here"):
        transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder)


def test_a_claim_that_transformers_would_not_see(artifact: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from omnifp4.runtime import load

    def hide(config: dict[str, Any]) -> None:
        config["thinker_config"]["quantization_config"] = config.pop("quantization_config")

    with pytest.raises(CheckpointError, match=r"told only in config.json: thinker_config.quantization_config"):
        load(changed(artifact(), tmp_path / "nested", config=hide))
    with pytest.raises(CheckpointError, match=r"holds NVFP4 codes, yet config.json has no quantization_config"):
        load(changed(artifact(), tmp_path / "none", config=lambda config: config.pop("quantization_config") and None))


def test_calibrated_but_never_quantized(tiny_omni: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from omnifp4.runtime import load

    left = add(f"{LINEAR}.weight_quantizer._amax", from_values(np.ones(1)))
    with pytest.raises(CheckpointError, match="was calibrated, but its weights were never quantized"):
        load(changed(tiny_omni, tmp_path / "amax", left))


def test_what_cannot_fit(artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from omnifp4.runtime import load

    monkeypatch.setattr("omnifp4.runtime.loading.available_bytes", lambda: 1_000_000)
    with pytest.raises(OmniFP4Error, match=r"weights take 0\.0 GB and cpu has 0\.0 GB free.*speech=False"):
        load(artifact(), device="cpu")


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("tpu", "device is 'tpu' .allowed: auto, cpu, cuda"),
        ("cuda:x", "device is 'cuda:x'"),
        ("meta", "device is 'meta'"),
        ("cuda", "device 'cuda' was asked for, and torch sees no GPU .omnifp4 doctor"),
    ],
)
def test_devices_that_are_not_there(
    artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, device: str, told: str
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from omnifp4.runtime import load

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OmniFP4Error, match=told):
        load(artifact(), device=device)
