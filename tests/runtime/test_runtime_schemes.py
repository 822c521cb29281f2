"""FP8, MXFP4 and INT8 weights in a loaded model: the numbers of their fake-quant twins, saved as they were, faults told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnifp4.checkpoint.artifact import find_coded
from omnifp4.checkpoint.dialects.coded import VALUES_PER_ELEMENT
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.formats import coded
from omnifp4.formats.coded import CODED_SCHEMES
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.formats.scheme import Scheme
from small_checkpoints import MIXED_COMPONENTS

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")
DIALECTS = pytest.mark.parametrize("dialect", MIXED_COMPONENTS)


def load(folder: Path, **options: Any) -> Any:
    from omnifp4.runtime import load as load_model

    return load_model(folder, device="cpu", progress=False, **options)


@DIALECTS
def test_numbers_are_those_of_the_fake_twin(mixed_artifacts: dict[str, Path], dialect: str) -> None:
    packed, fake = load(mixed_artifacts[dialect]), load(mixed_artifacts[f"{dialect}-fake"])
    tokens = torch.arange(5, 40)[None]
    hidden = torch.randn(
        1, 6, packed.talker.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0)
    ).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(packed.thinker(input_ids=tokens).logits, fake.thinker(input_ids=tokens).logits)
        states = [model.talker.model(inputs_embeds=hidden).last_hidden_state for model in (packed, fake)]
    assert torch.equal(*states)
    assert states[0].isfinite().all()
    assert states[0].abs().max() > 0


@DIALECTS
def test_memory_is_that_of_the_codes(mixed_artifacts: dict[str, Path], dialect: str) -> None:
    from omnifp4.runtime.coded import SchemeModule

    model, tensors = load(mixed_artifacts[dialect]), open_checkpoint(mixed_artifacts[dialect]).tensors
    on_disk = sum(entry.nbytes for linear in find_coded(tensors).values() for entry in linear.entries[:2])
    modules = [module for module in model.modules() if isinstance(module, SchemeModule)]
    in_memory = sum(buffer.nbytes for module in modules for buffer in module.buffers(recurse=False))
    assert in_memory == on_disk
    model.to(torch.float64)
    for module in modules:
        assert {buffer.dtype for name, buffer in module.named_buffers(recurse=False) if name.endswith("codes")} == {
            torch.uint8
        }
        assert all(
            buffer.dtype == module.form.scale_dtype
            for name, buffer in module.named_buffers(recurse=False)
            if "scale" in name
        )


@DIALECTS
def test_saving_gives_the_checkpoint_back(mixed_artifacts: dict[str, Path], tmp_path: Path, dialect: str) -> None:
    load(mixed_artifacts[dialect]).save_pretrained(tmp_path / "saved")
    before, after = open_checkpoint(mixed_artifacts[dialect]), open_checkpoint(tmp_path / "saved")
    assert before.tensors.keys() == after.tensors.keys()
    with CheckpointReader(before) as one, CheckpointReader(after) as other:
        for name, entry in before.tensors.items():
            again = after.tensors[name]
            assert (entry.dtype, entry.shape) == (again.dtype, again.shape), name
            assert one.read(entry).tobytes() == other.read(again).tobytes(), name
    assert after.config["quantization_config"] == before.config["quantization_config"]


def test_transformers_own_door_opens_too(mixed_artifacts: dict[str, Path]) -> None:
    import transformers

    import omnifp4  # noqa: F401

    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(mixed_artifacts["modelopt"])
    ours = load(mixed_artifacts["modelopt"])
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(model.thinker(input_ids=tokens).logits, ours.thinker(input_ids=tokens).logits)


def test_eight_bits_alone_are_taken_by_our_own_load_only(tiny_omni: Path, tmp_path: Path) -> None:
    from omnifp4 import quantize
    from omnifp4.runtime.claim import announces_nvfp4

    folder = tmp_path / "int8"
    quantize(
        tiny_omni,
        folder,
        components=["thinker.attention=int8", "thinker.experts=int8"],
        format="compressed-tensors",
        threads=2,
        check=False,
    )
    claim = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert not announces_nvfp4(claim)
    model = load(folder, speech=False)
    assert {module.form.scheme for module in model.modules() if hasattr(module, "form")} == {Scheme.INT8}
    with torch.no_grad():
        assert model.thinker(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("scheme", CODED_SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unpacking_is_the_reference(scheme: Scheme, dtype: Any) -> None:
    from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, Activations
    from omnifp4.checkpoint.dialects.coded import CodedLinear
    from omnifp4.runtime.coded import CodedForm, decode

    weight = np.random.default_rng(1).standard_t(3, (24, 96)).astype(np.float32)
    done = coded.encode(weight, scheme, ScaleRule.MAX)
    form = COMPRESSED_TENSORS.coded_forms[scheme]
    stored = COMPRESSED_TENSORS.stored("m", (24, 96), Activations.WIDE, scheme)
    entries = [TensorEntry(t.name, "a", t.dtype, t.shape, 0, 0) for t in stored]
    source = CodedLinear("m", scheme, entries[0], entries[1])
    scale = torch.from_numpy(form.scale_on_disk(done.scale).copy())
    if form.scale_dtype == "BF16":
        scale = scale.view(torch.bfloat16)
    codes = torch.from_numpy(form.codes_on_disk(done.codes).copy())
    assert codes.shape[1] * 8 * VALUES_PER_ELEMENT[form.codes_dtype] % 96 == 0
    unpacked = decode(codes, scale, CodedForm.of(source), dtype)
    assert torch.equal(unpacked, torch.from_numpy(coded.decode(done)).to(dtype))


def test_one_scale_for_a_whole_tensor(tmp_path: Path, mixed_artifacts: dict[str, Path]) -> None:
    """What other tools write as FP8: one scale, and one for inputs, which are kept."""
    from safetensors.torch import load_file, save_file

    folder = _copy(mixed_artifacts["modelopt"], tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if name.endswith("_scale") and tensors[name].ndim == 1]
    assert len(names) > 20
    for name in names:
        tensors[name] = tensors[name].max()
        tensors[name.replace("weight_scale", "input_scale")] = torch.tensor(0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    linear = model.thinker.lm_head
    wanted = tensors["thinker.lm_head.weight"].float() * tensors["thinker.lm_head.weight_scale"]
    assert torch.equal(linear.weight, wanted.to(torch.bfloat16))
    experts = model.talker.model.layers[0].mlp.experts
    with torch.no_grad():
        x = torch.randn(3, experts.hidden_dim, dtype=torch.bfloat16)
        assert experts(x, torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5)).isfinite().all()
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in names)


@pytest.mark.parametrize(
    ("ending", "change", "told"),
    [
        ("self_attn.q_proj.weight_scale", lambda t: t.fill_(float("nan")), "scales of .* no positive finite"),
        ("self_attn.q_proj.weight_scale", lambda t: t.fill_(0), "scales of .* no positive finite"),
        ("self_attn.q_proj.weight", lambda t: t.view(torch.uint8)[0, :1].fill_(0x7F), "codes of .* are NaN"),
        ("talker.model.layers.0.self_attn.k_proj.weight_scale", lambda t: t[0, :1].fill_(255), "scales of"),
        ("self_attn.q_proj.weight_scale", None, "scale is missing"),
        ("experts.1.up_proj.weight_scale", None, "scale is missing"),
    ],
)
def test_damage_is_told_by_name(
    mixed_artifacts: dict[str, Path], tmp_path: Path, ending: str, change: Callable[[Any], Any] | None, told: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = _copy(mixed_artifacts["modelopt"], tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    talker = ending.startswith("talker") or "experts" in ending
    name = next(
        name for name in tensors if name.endswith(ending) and name.startswith("talker" if talker else "thinker.model")
    )
    if change is None:
        del tensors[name]
    else:
        change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=told):
        load(folder)


@DIALECTS
def test_few_slots_at_once_are_the_loop(mixed_artifacts: dict[str, Path], dialect: str) -> None:
    from omnifp4.runtime.coded import SchemeExperts

    model = load(mixed_artifacts[dialect], dtype="float32")
    random = torch.Generator().manual_seed(1)
    for experts in (module for module in model.modules() if isinstance(module, SchemeExperts)):
        x = torch.randn(3, experts.hidden_dim, generator=random)
        # The last slot is routed nowhere.
        index = torch.tensor([[0, 1], [2, 0], [1, experts.num_experts]])
        weights = torch.rand(3, 2, generator=random)
        with torch.no_grad():
            looped, at_once = experts(x, index, weights), experts.gathered(x, index, weights)
        assert torch.allclose(looped, at_once, rtol=1e-5, atol=1e-5 * float(looped.abs().max()))


def test_kernels_are_told_why_not(mixed_artifacts: dict[str, Path]) -> None:
    from omnifp4.decoding.decoder_weights import why_not
    from omnifp4.runtime.coded import why_not_coded

    model = load(mixed_artifacts["modelopt"], speech=False)
    reason = why_not_coded(model.thinker.get_decoder())
    assert reason == "its layers.0.self_attn.q_proj is in fp8, and the kernels read NVFP4 and BF16"
    assert why_not_coded(torch.nn.Linear(2, 2)) == ""
    assert why_not(model) == reason
    model.thinker.model = load(mixed_artifacts["compressed-tensors"], speech=False).thinker.model
    assert "layers.0.self_attn.q_proj is in int8" in why_not(model)


def _copy(source: Path, out: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, out))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@DIALECTS
def test_a_gpu_holds_and_unpacks_the_same(mixed_artifacts: dict[str, Path], dialect: str) -> None:
    from omnifp4.runtime import load as load_model
    from omnifp4.runtime.coded import SchemeExperts, SchemeLinear, decode

    host, device = load(mixed_artifacts[dialect]), load_model(mixed_artifacts[dialect], device="cuda", progress=False)
    for one, other in zip(host.modules(), device.modules(), strict=True):
        if isinstance(one, SchemeLinear):
            assert other.codes.is_cuda
            assert torch.equal(one.weight, other.weight.cpu())
        elif isinstance(one, SchemeExperts):
            for part in ("gate_up", "down"):
                values = [decode(*getattr(m, part)(1), m.form, torch.bfloat16).cpu() for m in (one, other)]
                assert torch.equal(*values)
    tokens = torch.arange(5, 40)[None]
    with torch.no_grad():
        logits = [m.thinker(input_ids=tokens.to(m.device)).logits.float().cpu() for m in (host, device)]
    # Routers of random weights hesitate: a few tokens may take other experts on another device, most may not.
    apart = (logits[0] - logits[1]).norm(dim=-1) / logits[0].norm(dim=-1)
    assert apart.median() < 0.02, apart
