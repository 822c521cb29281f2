"""Writes the commands that the hand-over makes for tiny artifacts on several machines, for check_vllm_command.py.

    python export_commands.py FOLDER

FOLDER/commands.json: a list of objects with name, engine, arguments (after `serve`), and files by path.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omnifp4 import api
from omnifp4.handover.options import Options
from omnifp4.handover.serving import prepare
from omnifp4.handover.talk import PlainTalk
from omnifp4.receipt.doctor import Accelerator, Machine
from omnifp4.tiny import write_tiny_omni

GB = 10**9
MACHINES = {"one-h200": ("9.0", 150, 1), "two-h200": ("9.0", 150, 2), "four-b200": ("10.0", 190, 4), "none": ("", 0, 0)}


def machine(capability: str, size: int, count: int) -> Machine:
    gpu = Accelerator(name="a GPU", memory_bytes=size * GB, free_bytes=size * GB, compute_capability=capability)
    return Machine(
        python="3.12",
        system="Linux",
        machine="x86_64",
        cores=8,
        ram_bytes=64 * GB,
        ram_free_bytes=64 * GB,
        torch_build="",
        torch_problem="",
        accelerators=(gpu,) * count,
    )


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    artifact = folder / "tiny-ct"
    write_tiny_omni(folder / "tiny", random_weights=True)
    api.quantize(folder / "tiny", artifact, format="compressed-tensors")
    commands = []
    for engine in ("vllm", "vllm-omni"):
        for name, (capability, size, count) in MACHINES.items():
            for options in (Options(cache=folder), Options(cache=folder, emulate=True)):
                prepared = prepare(
                    str(artifact),
                    engine,
                    options,
                    host="127.0.0.1",
                    port=8000,
                    print_only=True,
                    output=PlainTalk(),
                    machine=machine(capability, size, count),
                )
                arguments = list(prepared.command.arguments)
                commands.append(
                    {
                        "name": f"{engine}, {name}{', emulated' if options.emulate else ''}",
                        "engine": engine,
                        "arguments": arguments[arguments.index("serve") + 1 :],
                        "files": {str(path): text for path, text in prepared.command.files.items()},
                    }
                )
    (folder / "commands.json").write_text(json.dumps(commands, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
