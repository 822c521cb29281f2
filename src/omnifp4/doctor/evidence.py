"""What was seen while a script ran: the record of the watch, its output, and the checkpoints it touched."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from omnifp4.doctor.facts import Facts, read_facts
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.diagnosis import CallCount, CatCount, GenerateRecord, LoadRecord, Outcome, StructureReport

EVENTS_LIMIT: Final = 2_000_000
FAILURE: Final = re.compile(r"error|exception|warning|fail|\u274c|1\.00x", re.IGNORECASE)
ANSI: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Thrown:
    """An exception, caught by the script or not.

    Attributes:
        phase: script, load, generate, call, template, calibration, vllm, thread; or output, if it was only printed.
        chain: what led to it.
        frames: ``file:line in function: code``, innermost last.
        empty: names of lists that were empty in the innermost frame.
        caller: the innermost line of the script itself.
        count: how often.
    """

    phase: str
    type: str
    message: str
    subject: str = ""
    chain: tuple[str, ...] = ()
    frames: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    caller: str = ""
    count: int = 1

    @property
    def text(self) -> str:
        """Type and message, in one line."""
        return " ".join(f"{self.type}: {self.message}".split()) if self.type else self.message

    @property
    def whole(self) -> str:
        """Everything that is told, for matching."""
        return "\n".join((self.text, *self.chain))

    @property
    def place(self) -> str:
        """The innermost frame."""
        return self.frames[-1] if self.frames else ""


@dataclass
class Evidence:
    """One run, read but not judged."""

    outcome: Outcome = Outcome.ENDED
    status: int | None = 0
    seconds: float = 0.0
    stalled_for: float = 0.0
    busy: bool = False
    thrown: list[Thrown] = field(default_factory=list)
    loads: list[LoadRecord] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    generates: list[GenerateRecord] = field(default_factory=list)
    roles_known: list[bool] = field(default_factory=list)
    calls: list[CallCount] = field(default_factory=list)
    calibrations: list[dict[str, Any]] = field(default_factory=list)
    templates: list[dict[str, Any]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    vllm: list[dict[str, str]] = field(default_factory=list)
    cat: CatCount = field(default_factory=CatCount)
    structure: StructureReport | None = None
    talker_disabled: bool = False
    is_loading: bool = False
    imported: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    stack: tuple[str, ...] = ()
    _facts: dict[str, Facts | None] = field(default_factory=dict)

    def find(self, pattern: str, *phases: str) -> list[Thrown]:
        """Exceptions whose text, or what led to them, matches; in `phases` only, if any are given."""
        wanted = re.compile(pattern, re.IGNORECASE | re.DOTALL)
        return [t for t in self.thrown if (not phases or t.phase in phases) and wanted.search(t.whole)]

    def printed(self, pattern: str) -> list[Thrown]:
        """Lines of the output that match: what a script says of an exception that it caught.

        Of a script that ended well only lines that speak of a failure count.
        """
        wanted = re.compile(pattern, re.IGNORECASE)
        lines = [line.strip() for line in self.lines if wanted.search(line)]
        if self.outcome is Outcome.ENDED:
            lines = [line for line in lines if FAILURE.search(line)]
        return [Thrown("output", "", lines[-1], count=len(lines))] if lines else []

    def seen(self, pattern: str) -> list[Thrown]:
        """Exceptions, or else lines of the output."""
        return self.find(pattern) or self.printed(pattern)

    def facts(self, path: str) -> Facts | None:
        """The checkpoint at a local path; None if it is none."""
        if path not in self._facts:
            self._facts[path] = None
            if path and Path(path).is_dir():
                with contextlib.suppress(OmniFP4Error):
                    self._facts[path] = read_facts(path)
        return self._facts[path]

    def loaded(self, kind: str = "model") -> Iterator[tuple[LoadRecord, Facts]]:
        """Loads of local checkpoints that could be read."""
        for load, of in zip(self.loads, self.kinds, strict=True):
            facts = self.facts(load.path) if of == kind else None
            if facts is not None:
                yield load, facts

    @property
    def has_omnifp4(self) -> bool:
        """Whether the script imported omnifp4."""
        return "omnifp4" in self.imported


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a record; a line that was cut short is left out."""
    for count, line in enumerate(path.read_text(errors="replace").splitlines()):
        if count >= EVENTS_LIMIT:
            return
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def is_loading(path: Path) -> bool:
    """Whether a load has begun and not ended."""
    open_loads = set()
    for event in read_events(path):
        if event["event"] == "load":
            open_loads.add(event["id"])
        elif event["event"] == "load-end":
            open_loads.discard(event["id"])
    return bool(open_loads)


def collect(path: Path, lines: list[str], stacks: Path) -> Evidence:
    """Everything that the record tells; how the run ended is for the caller to add."""
    found = Evidence(lines=[ANSI.sub("", line) for line in lines], is_loading=is_loading(path))
    loads: dict[Any, dict[str, Any]] = {}
    counted: dict[tuple[str, str, str], int] = {}
    thrown: list[dict[str, Any]] = []
    pending: dict[str, Any] | None = None
    for event in read_events(path):
        kind = event["event"]
        if kind == "load":
            loads[event["id"]] = event
        elif kind == "load-end":
            loads.setdefault(event["id"], {}).update({k: v for k, v in event.items() if k != "event"})
        elif kind == "generate-begin":
            pending = event
        elif kind == "generate":
            pending = None
            _add_generate(found, event)
        elif kind == "thrown":
            thrown.append(event)
        elif kind == "counters":
            calls, empty, place = event["cat"]
            found.cat = CatCount(calls=calls, empty=empty, place=place)
            found.calls = [CallCount(model=m, calls=c, failed=f, messages=t) for m, (c, f, t) in event["calls"].items()]
            found.versions = event["versions"]
            found.imported = tuple(found.versions)
            counted = {(phase, type_, text): count for phase, type_, text, count in event["thrown"]}
        elif kind == "structure":
            found.structure = _structure(event)
        elif kind == "calibration":
            found.calibrations.append(event)
        elif kind == "template-failed":
            found.templates.append(event)
        elif kind == "saved":
            found.saved.append(event["folder"])
        elif kind == "vllm":
            found.vllm.append({**event["arguments"], "path": event["path"]})
        elif kind == "talker-disabled":
            found.talker_disabled = True
    if pending is not None:
        _add_generate(found, pending)
    for event in thrown:
        count = counted.get((event["phase"], event["type"], event["message"]), 1)
        found.thrown.append(_thrown(event, count))
    for event in loads.values():
        found.kinds.append(str(event.get("kind", "")))
        found.loads.append(_load(event))
    found.stack = _stack(stacks)
    return found


def _add_generate(found: Evidence, event: dict[str, Any]) -> None:
    found.roles_known.append(event.get("roles") is not None)
    found.generates.append(
        GenerateRecord(
            model=event["model"],
            tokens=event["tokens"],
            roles=tuple(event.get("roles") or ()),
            arguments={**event["arguments"], **({"has_talker": "True"} if event.get("has_talker") else {})},
            result=event.get("result", ""),
            error=event.get("error", ""),
        )
    )


def _load(event: dict[str, Any]) -> LoadRecord:
    return LoadRecord(
        loader=event.get("loader", ""),
        path=event.get("path", ""),
        arguments=event.get("arguments", {}),
        seconds=event.get("seconds"),
        result=event.get("result", ""),
        error=event.get("error", ""),
    )


def _structure(event: dict[str, Any]) -> StructureReport:
    return StructureReport(
        model=event["model"],
        modules=event["modules"],
        parameters=event["parameters"],
        attention=event["attention"],
        dtypes=event["dtypes"],
        quantized_parameters=event["quantized"],
        quantized_share=event["quantized"] / max(1, event["parameters"]),
        packed=event["packed"],
    )


def _thrown(event: dict[str, Any], count: int) -> Thrown:
    return Thrown(
        phase=event["phase"],
        type=event["type"],
        message=event["message"],
        subject=event.get("subject", ""),
        chain=tuple(event["chain"]),
        frames=tuple(f"{file}:{line} in {function}: {code}" for file, line, function, code in event["frames"]),
        empty=tuple(event["empty"]),
        caller=event.get("caller", ""),
        count=count,
    )


def _stack(path: Path) -> tuple[str, ...]:
    """The main thread's frames from a dump, innermost first, without those of the watch."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ()
    blocks = re.split(r"\n(?=(?:Current thread|Thread) 0x)", text)
    named = [block for block in blocks if "runpy" in block or "doctor/watch/run.py" in block] or blocks[-1:]
    lines = [line.strip() for line in named[-1].splitlines() if line.strip().startswith("File ")] if named else []
    return tuple(
        line for line in lines if "doctor/watch" not in line and "frozen runpy" not in line and '"<string>"' not in line
    )[:24]
