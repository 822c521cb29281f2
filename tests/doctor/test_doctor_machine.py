"""The environment: with and without torch, GPU and driver; versions that belong together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from omnifp4.doctor import engine_rules, examine, machine, packages
from omnifp4.doctor.versions import Span, minor, numbers
from omnifp4.receipt.doctor import Accelerator

SMI = "NVIDIA H200, 143771, 143000, 9.0, 580.95.05\n"


def fake_smi(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!{sys.executable}\nprint({text.strip()!r})\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_examine_without_model() -> None:
    receipt = examine()
    assert receipt.can_run
    assert receipt.checkpoint is None and receipt.engines == () and receipt.fit is None
    assert receipt.machine.ram_bytes >= receipt.machine.ram_free_bytes > 0
    names = [tool.name for tool in receipt.tools]
    assert {"torch", "transformers", "vllm", "vllm-omni", "sglang", "tensorrt-edgellm", "ffmpeg"} <= set(names)


def test_nothing_heavy_is_imported(tiny: Path) -> None:
    code = (
        "import sys; from omnifp4.doctor import examine; r = examine(sys.argv[1]); "
        "print(r.can_run, sorted({'torch', 'transformers', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1)[1].strip() == "[]"


def test_bare_machine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither torch nor anything else is installed."""
    monkeypatch.setattr(packages, "installed", lambda name: "")
    monkeypatch.setattr("omnifp4.doctor.packages._program_version", lambda *_: "")
    receipt = examine(str(tiny))
    assert not receipt.can_run
    assert receipt.machine.torch_build == ""
    assert receipt.engines[0].reasons[0] == "torch is not installed"
    assert receipt.engines[0].fix == "pip install 'omnifp4[run]'"
    assert all(row.fix for row in receipt.engines)


def test_driver_rows() -> None:
    (gpu,) = machine.parse_smi(SMI)
    assert gpu == Accelerator(
        name="NVIDIA H200",
        memory_bytes=143771 * 2**20,
        free_bytes=143000 * 2**20,
        compute_capability="9.0",
        driver="580.95.05",
    )
    (thor,) = machine.parse_smi("NVIDIA Thor, [N/A], [N/A], 11.0, 580.00\n")
    assert thor.memory_bytes == machine.memory_bytes()[0]
    assert machine.parse_smi("nonsense\n") == ()


def test_gpu_beside_a_cpu_build_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, SMI, monkeypatch)
    seen = machine.look_at_machine("2.13.0+cpu")
    assert seen.torch_build == "CPU"
    assert [gpu.name for gpu in seen.accelerators] == ["NVIDIA H200"]
    assert seen.torch_problem == "torch is a CPU build, so it cannot use the GPU"
    without = machine.look_at_machine("")
    assert (without.torch_build, without.torch_problem) == ("", "")


def test_torch_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TORCH_PROBE", "import sys; sys.exit('libcudart.so.13: cannot open')")
    monkeypatch.setattr(machine, "ask_nvidia_smi", lambda: ())
    seen = machine.look_at_machine("2.13.0")
    assert seen.torch_problem == "torch does not import: libcudart.so.13: cannot open"
    assert seen.accelerators == ()


def test_torch_tells_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    told = '{"version": "2.13.0", "cuda": "13.0", "hip": null, "devices": [["NVIDIA H200", 150, 140, "9.0"]]}'
    monkeypatch.setattr(machine, "TORCH_PROBE", f"print({told!r})")
    monkeypatch.setattr(machine, "ask_nvidia_smi", lambda: machine.parse_smi(SMI))
    seen = machine.look_at_machine("2.13.0")
    assert (seen.torch_build, seen.torch_problem) == ("CUDA 13.0", "")
    assert (seen.accelerators[0].memory_bytes, seen.accelerators[0].driver) == (150, "580.95.05")


@pytest.mark.parametrize(
    ("package", "version", "others", "told"),
    [
        ("vllm", "0.26.0", {"torch": "2.13.0"}, "vllm 0.26.0 needs torch 2.11, and 2.13.0 is installed"),
        ("vllm", "0.30.0", {"torch": "2.13.0+cu130"}, ""),
        ("vllm", "0.33.0", {"torch": "2.14.0", "transformers": "5.23.0"}, "transformers below 5.21"),
        ("vllm-omni", "0.30.0", {"transformers": "5.17.0"}, "transformers below 5.15"),
        ("torchvision", "0.28.0", {"torch": "2.14.0"}, "torchvision 0.28.0 needs torch 2.13"),
        ("torchvision", "0.28.0", {"torch": "2.13.1"}, ""),
    ],
)
def test_version_pairs(package: str, version: str, others: dict[str, str], told: str) -> None:
    found = engine_rules.broken_pairs(package, version, others)
    assert found == [] if not told else told in found[0]


def test_kernels_by_capability() -> None:
    assert engine_rules.kernels_for("7.0") is None
    assert engine_rules.kernels_for("") is None
    assert "Marlin" in (engine_rules.kernels_for("9.0") or engine_rules.KERNELS[1]).weights
    native = [row.first for row in engine_rules.KERNELS if row.native]
    assert native == [(10, 0), (11, 0), (12, 0)]


def test_versions() -> None:
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert minor("5") == (5, 0)
    assert numbers("unknown") == ()
    assert Span("0.26", "0.33").holds("0.33.1")
    assert not Span("0.26", "0.33").holds("0.34")
    assert str(Span("0.9")) == "0.9 or later"
