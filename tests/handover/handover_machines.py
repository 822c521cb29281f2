"""GPUs and machines to hand artifacts to, and ears for what is said."""

from __future__ import annotations

import os

from rich.console import Console, RenderableType

from omnifp4.handover.talk import PlainTalk
from omnifp4.receipt.doctor import Accelerator, Machine

GB = 10**9


def gpu(capability: str = "9.0", memory: int = 150 * GB, free: int | None = None) -> Accelerator:
    kept = memory - GB if free is None else free
    return Accelerator(name="a GPU", memory_bytes=memory, free_bytes=kept, compute_capability=capability)


def machine(*gpus: Accelerator) -> Machine:
    return Machine(
        python="3.12",
        system="Linux",
        machine="x86_64",
        cores=8,
        ram_bytes=64 * GB,
        ram_free_bytes=64 * GB,
        torch_build="",
        torch_problem="",
        accelerators=gpus,
    )


class Heard(PlainTalk):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def show(self, shown: RenderableType) -> None:
        console = Console(width=500, file=open(os.devnull, "w"), record=True)  # noqa: SIM115, PTH123
        console.print(shown)
        self.text += console.export_text()
        console.file.close()

    def say(self, text: str) -> None:
        self.text += text + "\n"
