"""Runs the decode kernels' own sources on a CPU: every CUDA thread is a fiber, and what threads do is watched.

What is checked beside the results is listed at the head of emulation/runtime.cpp. Needs a C++ compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omnifp4.kernels.cuda.compiler import COMMON, SOURCES
from omnifp4.kernels.cuda.decoder_plan import Processor
from omnifp4.kernels.cuda.launching import Argument, Wanted

HERE = Path(__file__).parent / "emulation"
OPTIONS = ("-std=c++20", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-ffp-contract=off")
KERNEL_OPTIONS = (
    "-O1", "-fsanitize=thread", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fno-store-merging",
    "-fvisibility=hidden", "-fno-exceptions", "-fno-tree-loop-distribute-patterns",
)  # fmt: skip

TWINS = {
    "wait_for_previous": "emulated_wait_for_previous();",
    "let_next_start": "emulated_let_next_start();",
    "pack": "return emulated_narrow(lo) | (u32)emulated_narrow(hi) << 16;",
    "multiply": "return emulated_narrow((double)low(a) * low(b)) | (u32)emulated_narrow((double)high(a) * high(b)) << 16;",
    "load_once": "uint4 v; emulated_load(at, 16, READ_ONLY, &v); return v;",
    "load_shared_result": "uint4 v; emulated_load(at, 16, CACHED_GLOBALLY, &v); return v;",
    "load": "uint4 v; emulated_load(at, 16, PLAIN, &v); return v;",
    "mma": """
        float sums[4] = {c[0], c[1], c[2], c[3]};
        const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
        emulated_mma(sums, a, b);
        for (int i = 0; i < 4; i++) c[i] = sums[i];""",
    "copy16": "emulated_copy16(to, from);",
    "end_of_copies": "emulated_end_of_copies();",
    "wait_for_copies": "emulated_wait_for_copies(ahead);",
    "load_shared16": "uint4 v; emulated_load_shared(at, 16, &v); return v;",
    "load_shared4": "u32 v; emulated_load_shared(at, 4, &v); return v;",
    "team_barrier": "emulated_barrier(team + 1, threads);",
}
"""What stands in for the functions of the sources that hold PTX, by name."""


class EmulationError(AssertionError):
    """A kernel did what no kernel may, or did not end."""


def compiler() -> str | None:
    """The C++ compiler of this machine; None where there is none that the emulator can use."""
    return shutil.which("g++") if sys.platform == "linux" else None


@dataclass(frozen=True)
class Parameter:
    """Of a kernel, as its source declares it."""

    type: str
    name: str
    is_restrict: bool

    @property
    def is_pointer(self) -> bool:
        return self.type.endswith("*")

    @property
    def is_writable(self) -> bool:
        return self.is_pointer and not self.type.startswith("const ")

    @property
    def is_read_only(self) -> bool:
        """The compiler may read it through the read-only path."""
        return self.is_pointer and not self.is_writable and self.is_restrict


def without_ptx(text: str) -> str:
    """The source with `TWINS` in the place of functions that hold PTX; raises where one is not known."""
    found = list(re.finditer(r"^DEVICE [^\n;{]*?\b(\w+)\([^;{]*\) \{", text, re.MULTILINE))
    for match in reversed(found):
        end, depth = match.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if re.search(r"\basm\b", text[match.end() : end]):
            if match[1] not in TWINS:
                raise EmulationError(f"{match[1]} holds PTX and has no twin in TWINS")
            text = f"{text[: match.end()]} {TWINS[match[1]]} }}{text[end:]}"
    if left := re.search(r"\basm\b", re.sub(r"//[^\n]*", "", text)):
        raise EmulationError(f"PTX outside of a DEVICE function: {left.string[left.start() : left.start() + 80]}")
    return text


def parameters_of(text: str, kernel: str) -> list[Parameter]:
    """A kernel's parameters in order."""
    declared = re.search(rf"__global__[^{{;]*?\b{kernel}\(([^{{]*)\) \{{", text)
    if declared is None:
        raise EmulationError(f"no kernel {kernel}")
    parameters: list[Parameter] = []
    for part in re.sub(r"//[^\n]*", "", declared[1]).split(","):
        tokens = re.match(r"\s*((?:const )?\w+\s*\**)\s*(\w+)\s*$", part.replace("__restrict__", ""))
        if tokens is None:
            raise EmulationError(f"parameter of {kernel}: {part.strip()}")
        parameters.append(Parameter(tokens[1].replace(" *", "*").strip(), tokens[2], "__restrict__" in part))
    return parameters


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("read_only", ctypes.c_uint32),
        ("name", ctypes.c_char * 40),
    ]


@dataclass
class EmulatedKernel:
    """Stands in for `omnifp4.kernels.cuda.launching.Kernel`."""

    name: str
    threads: int
    shared_bytes: int
    parameters: list[Parameter]
    library: ctypes.CDLL
    emulator: Emulator
    dependent: bool

    def launch(self, grid: Sequence[int], *arguments: Argument) -> None:
        """Run it whole."""
        if len(arguments) != len(self.parameters):
            raise EmulationError(f"{self.name}: {len(arguments)} arguments for {len(self.parameters)} parameters")
        values, buffers = [], []
        for parameter, argument in zip(self.parameters, arguments, strict=True):
            if parameter.is_pointer != (argument is None or isinstance(argument, Tensor)):
                raise EmulationError(f"{self.name}: {parameter.name} is {parameter.type}, given {argument!r}")
            if isinstance(argument, Tensor):
                if not argument.is_contiguous():
                    raise EmulationError(f"{self.name}: {parameter.name} is not contiguous")
                begin, end = argument.data_ptr(), argument.data_ptr() + argument.nbytes
                buffers.append(
                    _Buffer(begin, end, parameter.is_writable, parameter.is_read_only, parameter.name.encode())
                )
                values.append(begin)
            elif isinstance(argument, float):
                if parameter.type != "float":
                    raise EmulationError(f"{self.name}: {parameter.name} is {parameter.type}, given {argument!r}")
                values.append(struct.unpack("<I", struct.pack("<f", argument))[0])
            elif argument is None:
                values.append(0)
            else:
                if parameter.type not in ("int", "u32"):
                    raise EmulationError(f"{self.name}: {parameter.name} is {parameter.type}, given {argument!r}")
                values.append(argument & 0xFFFFFFFF)
        for one in buffers:
            for other in buffers:
                if one.read_only and other.writable and one.begin < other.end and other.begin < one.end:
                    raise EmulationError(f"{self.name}: {one.name} is read only and lies in {other.name}")
        self.emulator.run(self, (*grid, 1, 1)[:3], values, buffers)


class Emulator:
    """Compiles sources for the CPU, once per set of constants, and runs them.

    Attributes:
        seed: of the order in which blocks and threads run.
        edit: a change of a source's text, by its name; for tests of the emulator.
        launched: names of the kernels that have run, in order.
    """

    def __init__(self, folder: Path) -> None:
        """Libraries are kept in `folder`."""
        self._folder = folder
        self.seed = 0
        self.edit: Callable[[str, str], str] = lambda _, text: text
        self.launched: list[str] = []
        self._runtime_path = folder / "libruntime.so"
        self._compile(["-O2", "-shared", str(HERE / "runtime.cpp"), "-o", str(self._runtime_path)])
        self._runtime = ctypes.CDLL(str(self._runtime_path), mode=ctypes.RTLD_GLOBAL)
        self._libraries: dict[Path, ctypes.CDLL] = {}

    def load_kernels(
        self, kernels: Mapping[str, Wanted], device: torch.device, *, dependent: bool = True
    ) -> dict[str, EmulatedKernel]:
        """Stands in for `omnifp4.kernels.cuda.launching.load_kernels`."""
        groups: dict[tuple[str, tuple[tuple[str, int], ...]], set[str]] = {}
        for kernel in kernels.values():
            groups.setdefault((kernel.source, kernel.constants), set()).add(kernel.name)
        with ThreadPoolExecutor(2) as pool:
            paths = dict(
                zip(groups, pool.map(lambda key: self._build(key[0], key[1], groups[key]), groups), strict=True)
            )
        loaded = {}
        for key, kernel in kernels.items():
            text = self.edit(kernel.source, (SOURCES / kernel.source).read_text())
            loaded[key] = EmulatedKernel(
                kernel.name, kernel.threads, kernel.shared_bytes, parameters_of(text, kernel.name),
                self._library(paths[kernel.source, kernel.constants]), self, dependent,
            )  # fmt: skip
        return loaded

    def forget(self) -> None:
        """The memory of earlier launches is the caller's again."""
        self._runtime.emulator_forget()
        self.launched.clear()

    def run(self, kernel: EmulatedKernel, grid: Sequence[int], values: list[int], buffers: list[_Buffer]) -> None:
        """One launch; raises EmulationError with what went wrong."""
        library, error = kernel.library, ctypes.create_string_buffer(1024)
        failed = self._runtime.emulator_launch(
            kernel.name.encode(), library[f"enter_{kernel.name}"], (ctypes.c_uint64 * len(values))(*values),
            *(ctypes.c_uint32(n) for n in (*grid, kernel.threads, kernel.shared_bytes)),
            *(ctypes.c_void_p(getattr(library, f"shared_{end}")()) for end in ("begin", "end")),
            (_Buffer * len(buffers))(*buffers), len(buffers), int(kernel.dependent), ctypes.c_uint64(self.seed),
            error, len(error),
        )  # fmt: skip
        self.launched.append(kernel.name)
        if failed:
            raise EmulationError(error.value.decode())

    def _library(self, path: Path) -> ctypes.CDLL:
        if path not in self._libraries:
            library = ctypes.CDLL(str(path))
            for end in ("begin", "end"):
                getattr(library, f"shared_{end}").restype = ctypes.c_void_p
            self._libraries[path] = library
        return self._libraries[path]

    def _build(self, source: str, constants: tuple[tuple[str, int], ...], names: set[str]) -> Path:
        text = "\n".join(self.edit(name, (SOURCES / name).read_text()) for name in (COMMON, source))
        glue = "".join(_entry(name, parameters_of(text, name)) for name in sorted(names))
        # `extern __shared__ T shared[]` is where the launch says.
        text = re.sub(
            r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
            r"\1* const \2 = (\1*)emulated_dynamic;",
            without_ptx(text),
        )
        defines = [f"-D{name}={value}" for name, value in sorted({"FP4": 1, **dict(constants)}.items())]
        program = f'#include "{HERE / "device.hpp"}"\n#undef INFINITY\n{text}\n{GLUE}{glue}'
        key = hashlib.sha256(repr((program, defines)).encode()).hexdigest()[:24]
        library, unit = (self._folder / f"{Path(source).stem}-{key}.{ext}" for ext in ("so", "cpp"))
        if not library.is_file():
            unit.write_text(program)
            made = unit.with_suffix(".o")
            self._compile([*KERNEL_OPTIONS, *defines, "-c", str(unit), "-o", str(made)])
            self._compile(["-shared", "-Wl,-Bsymbolic", str(made), str(self._runtime_path), "-lm", "-o", str(library)])
        return library

    def _compile(self, arguments: list[str]) -> None:
        command = [compiler() or "g++", *OPTIONS, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EmulationError(f"{' '.join(command)}\n{done.stderr[:4000]}")


GLUE = """
#define VISIBLE extern "C" __attribute__((visibility("default"), no_sanitize("thread")))
extern "C" char __start_emulated_shared[] __attribute__((weak, visibility("hidden"))),
    __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
VISIBLE void* shared_begin() { return __start_emulated_shared; }
VISIBLE void* shared_end() { return __stop_emulated_shared; }
"""


def _entry(kernel: str, parameters: list[Parameter]) -> str:
    given = [
        f"({p.type})v[{i}]" if p.type != "float" else f"__uint_as_float((u32)v[{i}])" for i, p in enumerate(parameters)
    ]
    return f"VISIBLE void enter_{kernel}(const u64* v) {{ {kernel}({', '.join(given)}); }}\n"


def use(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, processor: Processor) -> None:
    """`DecoderKernels` and its neighbours on CPU tensors, cut for `processor`, run on the emulator."""
    from omnifp4.kernels.cuda import decoder, prompt, sampling

    for module in (decoder, prompt, sampling):
        monkeypatch.setattr(module, "load_kernels", emulator.load_kernels)
    monkeypatch.setattr(Processor, "of", classmethod(lambda *_: processor))
