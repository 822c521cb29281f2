"""Samples to evaluate on: conversations with media, and answers where they are known."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from omnifp4.chat.errors import ChatError, MediaError
from omnifp4.chat.media import MediaRules, load_media
from omnifp4.chat.messages import MEDIA, Message, check_last, is_unicode, normalise
from omnifp4.chat.sources import scheme_of
from omnifp4.errors import OmniFP4Error

BUNDLED: Final = "bundled"
"""Name of the samples that ship with the package."""

MIXED: Final = "mixed"
KEYS: Final = ("id", "task", "messages", "answer", "speak")
LINE_LIMIT_BYTES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation.

    Attributes:
        name: unique in the data.
        task: what is asked, such as ``picture digit``; empty if nothing is counted as right or wrong.
        modality: ``text``, ``image``, ``audio``, ``video``, or ``mixed``.
        messages: normalised, the user's turn last; media are read by `read_media`.
        answer: text of the answer, or None.
        speak: the answer is also spoken.
    """

    name: str
    task: str
    modality: str
    messages: tuple[Message, ...]
    answer: str | None
    speak: bool = False


def read_data(data: str | Path) -> tuple[Sample, ...]:
    """Read samples, and check that every medium is there.

    Args:
        data: ``"bundled"``, or a JSONL file: one object a line with ``messages`` as `normalise` takes them and, each
            optional, ``answer``, ``task``, ``id`` and ``speak``; null is as good as missing. A conversation that ends with
            the assistant's turn has that as its answer. Paths of media are relative to the file.

    Raises:
        OmniFP4Error: the file, a line or a medium is missing or not right, or there are no samples.
    """
    path = (
        Path(str(files("omnifp4.evaluation").joinpath("samples", "samples.jsonl"))) if data == BUNDLED else Path(data)
    )
    try:
        # Not splitlines(): a text may hold U+2028 and its kin, which JSON need not escape. Some editors begin with a mark.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OmniFP4Error(
            f"{path}: cannot be read as JSONL: {error}",
            hint="give a file of one JSON object a line, or 'bundled'",
        ) from None
    found = tuple(_samples(path, lines))
    if not found:
        raise OmniFP4Error(f"{path}: holds no samples", hint='a line is {"messages": "Hello", "answer": "Hi"}')
    seen: set[str] = set()
    for sample in found:
        if sample.name in seen:
            raise OmniFP4Error(f"{path}: two samples have the id {sample.name!r}")
        seen.add(sample.name)
    return found


def limited(samples: tuple[Sample, ...], most: int | None) -> tuple[Sample, ...]:
    """The first so many samples of each task and modality, spoken or not; None keeps all.

    Raises:
        OmniFP4Error: fewer than one.
    """
    if most is None:
        return samples
    if most < 1:
        raise OmniFP4Error(f"--samples is {most}", hint="1 or more")
    seen: dict[tuple[str, str, bool], int] = {}
    kept = []
    for sample in samples:
        group = (sample.task, sample.modality, sample.speak)
        seen[group] = seen.get(group, 0) + 1
        if seen[group] <= most:
            kept.append(sample)
    return tuple(kept)


def read_media(sample: Sample) -> list[Message]:
    """The sample's messages with decoded media.

    Raises:
        OmniFP4Error: a medium cannot be decoded; the message names the sample.
    """
    try:
        return load_media(sample.messages, MediaRules())[0]
    except MediaError as error:
        raise OmniFP4Error(f"sample {sample.name!r}: {error}") from error


def _samples(path: Path, lines: Sequence[str]) -> Iterator[Sample]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if len(line) > LINE_LIMIT_BYTES:
            raise OmniFP4Error(f"{where}: {len(line):,} characters", hint="give media as paths, not as data URLs")
        try:
            value = json.loads(line)
        except ValueError as error:
            raise OmniFP4Error(f"{where}: not JSON: {error}") from None
        except RecursionError:
            raise OmniFP4Error(f"{where}: lists and objects are nested too deep") from None
        if not isinstance(value, dict):
            raise OmniFP4Error(f"{where}: not an object", hint=f"with the keys {', '.join(KEYS)}")
        yield _sample(value, number, where, path.parent)


def _sample(value: Mapping[str, Any], number: int, where: str, home: Path) -> Sample:
    if unknown := sorted(set(value) - set(KEYS)):
        raise OmniFP4Error(f"{where}: unknown key {unknown[0]!r}", hint=f"allowed: {', '.join(KEYS)}")
    # Tables that are written as JSONL have null where a row has no value.
    value = {key: one for key, one in value.items() if one is not None}
    for key, kind in (("id", str), ("task", str), ("answer", str), ("speak", bool)):
        if key in value and not isinstance(value[key], kind):
            raise OmniFP4Error(f"{where}: {key} is {value[key]!r}", hint=f"it must be a {kind.__name__}")
        if isinstance(value.get(key), str) and not is_unicode(value[key]):
            raise OmniFP4Error(f"{where}: {key} holds half of a surrogate pair, which is no character")
        if key in ("id", "task") and not str(value.get(key, "")).isprintable():
            raise OmniFP4Error(f"{where}: {key} is {value[key]!r}: it holds characters that cannot be shown")
    if (task := value.get("task", "")) and not task.strip():
        raise OmniFP4Error(f"{where}: the task's name is {task!r}", hint="name it, or leave it out")
    try:
        messages = normalise(value.get("messages", []))
        answer = value.get("answer")
        if messages[-1]["role"] == "assistant" and answer is None and len(messages) > 1:
            answer = _plain_text(messages.pop())
        check_last(messages)
    except ChatError as error:
        raise OmniFP4Error(f"{where}: {error}") from error
    if answer is not None and not answer.strip():
        raise OmniFP4Error(f"{where}: the answer is empty", hint="leave it out, or give what the model should say")
    if value.get("task") and answer is None:
        raise OmniFP4Error(f"{where}: a task needs an answer to be judged by")
    if value.get("speak") and answer is None:
        raise OmniFP4Error(f"{where}: there is no answer that could be spoken", hint="give one, or leave speak out")
    messages = [_located(message, where, home) for message in messages]
    kinds = {part["type"] for message in messages for part in message["content"] if part["type"] in MEDIA}
    modality = "text" if not kinds else kinds.pop() if len(kinds) == 1 else MIXED
    name = value.get("id") or f"line {number}"
    return Sample(name, value.get("task", ""), modality, tuple(messages), answer, value.get("speak", False))


def _plain_text(message: Message) -> str:
    if any(part["type"] != "text" for part in message["content"]):
        raise ChatError("the assistant's last turn holds media", hint="an answer is text")
    return "".join(part["text"] for part in message["content"])


def _located(message: Message, where: str, home: Path) -> Message:
    """Media paths made absolute, and found to exist."""
    parts = []
    for part in message["content"]:
        source = part.get(part["type"]) if part["type"] in MEDIA else None
        if isinstance(source, str) and (scheme := scheme_of(source)) != "data":
            if scheme not in ("file", ""):
                raise OmniFP4Error(
                    f"{where}: {part['type']} {source[:80]!r} is on the network", hint="download it, and name the file"
                )
            path = urllib.request.url2pathname(source[len("file://") :]) if scheme else source
            found = home / path
            if not _is_file(found):
                raise OmniFP4Error(f"{where}: {part['type']} {path[:200]!r} is missing: no file {str(found)[:300]!r}")
            part = {**part, part["type"]: str(found)}
        parts.append(part)
    return {"role": message["role"], "content": parts}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False  # a name that no file can have
