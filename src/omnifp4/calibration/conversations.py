"""Sets of conversations to calibrate with: chosen evenly over modalities, copied into one folder, hashed, counted."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from omnifp4.calibration.encoding import Reader, SequenceError
from omnifp4.chat.messages import MEDIA
from omnifp4.checkpoint.folder import read_json
from omnifp4.checkpoint.staging import Staging
from omnifp4.errors import OmniFP4Error, OutputError
from omnifp4.evaluation.data import BUNDLED, Sample, read_data
from omnifp4.receipt.base import as_text, this_environment
from omnifp4.receipt.calibration import SET_VERSION, ModalityCount, SetReceipt

DEFAULT_SAMPLES: Final = 60
SET_FILE: Final = "dataset.json"
LINES_FILE: Final = "conversations.jsonl"
MEDIA_FOLDER: Final = "media"
MODALITIES: Final = ("text", "image", "audio", "video", "mixed")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Conversations under a name."""

    name: str
    samples: tuple[Sample, ...]


def open_set(data: str | Path, *, samples: int | None = None, seed: int = 0) -> CalibrationSet:
    """Read a set.

    Args:
        data: a folder that ``omnifp4 dataset`` made, whose files are checked; a JSONL file as evaluation takes it; or
            ``bundled``.
        samples: how many, evenly over modalities; None takes all, and 60 of the bundled.
        seed: of that choice.

    Raises:
        OmniFP4Error: missing, damaged, empty, or fewer conversations than asked for.
    """
    path = Path(data)
    if data == BUNDLED:
        found = read_data(bundled_file())
        count = DEFAULT_SAMPLES if samples is None else samples
        return CalibrationSet(BUNDLED, choose(found, count, seed, BUNDLED))
    if path.is_dir():
        _check_set(path)
    found = read_data(path / LINES_FILE if path.is_dir() else path)
    chosen = found if samples is None else choose(found, samples, seed, str(path))
    return CalibrationSet(as_text(path.name), chosen)


def bundled_file() -> Path:
    """The conversations that ship with the package."""
    return Path(str(files("omnifp4.calibration").joinpath("samples", "samples.jsonl")))


def choose(found: Sequence[Sample], count: int, seed: int, name: str) -> tuple[Sample, ...]:
    """So many, as evenly over modalities as there are, in the order of the source.

    Raises:
        OmniFP4Error: fewer are there.
    """
    if count < 1:
        raise OmniFP4Error(f"--samples is {count}", hint="1 or more")
    if count > len(found):
        raise OmniFP4Error(
            f"{name}: holds {len(found)} conversations, and {count} are asked for",
            hint="give a file of your own with --from" if name == BUNDLED else "lower --samples",
        )
    draw = random.Random(seed)
    groups = [[number for number, sample in enumerate(found) if sample.modality == modality] for modality in MODALITIES]
    for group in groups:
        draw.shuffle(group)
    taken: list[int] = []
    while len(taken) < count:
        taken += [group.pop() for group in groups if group]
    return tuple(found[number] for number in sorted(taken[:count]))


def make_set(
    out: Path,
    *,
    source: str | Path,
    samples: int | None,
    modalities: Sequence[str],
    seed: int,
    reader: Reader,
    progress: Progress,
) -> SetReceipt:
    """Write a set into the new folder `out`: conversations, their media, and a receipt.

    Args:
        out: must not exist; appears when it is whole.
        source: a JSONL file as evaluation takes it, another set, or ``bundled``.
        samples: how many; None takes 60, or all where a file has fewer.
        modalities: only these; all if empty.
        seed: of the choice.
        reader: reads every conversation as its model would, and counts tokens.
        progress: called with conversations read, conversations in all, and the name.

    Raises:
        OmniFP4Error: the source is not right, or a conversation cannot be read: nothing is written then; or the disk is
            full.
    """
    if unknown := sorted(set(modalities) - set(MODALITIES)):
        raise OmniFP4Error(f"modality {unknown[0]!r} is not known", hint=f"allowed: {', '.join(MODALITIES)}")
    name = BUNDLED if source == BUNDLED else as_text(Path(source).name)
    if source != BUNDLED and Path(source).is_dir():
        _check_set(Path(source))
        source = Path(source) / LINES_FILE
    found = read_data(bundled_file() if source == BUNDLED else source)
    wanted = [sample for sample in found if not modalities or sample.modality in modalities]
    if not wanted:
        raise OmniFP4Error(f"{name}: holds no conversation with {' or '.join(modalities)}")
    chosen = choose(wanted, samples if samples is not None else min(DEFAULT_SAMPLES, len(wanted)), seed, name)
    counts: dict[str, Counter[str]] = {}
    for number, sample in enumerate(chosen):
        if sample.modality not in reader.reads:
            raise OmniFP4Error(
                f"conversation {sample.name!r} is {sample.modality}, and {reader.name} does not read that",
                hint=" ".join(f"--modality {one}" for one in sorted(reader.reads)),
            )
        try:
            counts.setdefault(sample.modality, Counter()).update(reader.encode(sample).counts)
        except SequenceError as error:
            raise OmniFP4Error(f"conversation {sample.name!r}: {error.cause.value}: {error}") from error
        progress(number + 1, len(chosen), sample.name)
    with Staging(out, {"verb": "dataset"}, resume=True) as staging:
        try:
            digests = _write(staging.folder, chosen)
        except OSError as error:
            raise _not_written(out, error) from None
        receipt = SetReceipt(
            source=name,
            conversations=len(chosen),
            modalities=tuple(
                ModalityCount(
                    modality=modality,
                    conversations=sum(sample.modality == modality for sample in chosen),
                    tokens=dict(counts[modality]),
                )
                for modality in MODALITIES
                if modality in counts
            ),
            tokens=dict(sum(counts.values(), Counter())),
            spoken=sum(sample.speak for sample in chosen),
            counted_by=reader.name,
            seed=seed,
            files=digests,
            sha256=_together(digests),
            environment=this_environment(),
        )
        try:
            (staging.folder / SET_FILE).write_text(receipt.model_dump_json(indent=2) + "\n", "utf-8")
        except OSError as error:
            raise _not_written(out, error) from None
        staging.commit()
    return receipt


def _not_written(out: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{out}: cannot be written: {error.strerror}", hint="free some space, then the same command again"
    )


def _write(folder: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """Conversations and media; SHA-256 of each file by name."""
    media = folder / MEDIA_FOLDER
    shutil.rmtree(media, ignore_errors=True)
    media.mkdir()
    digests: dict[str, str] = {}
    lines = []
    for sample in samples:
        messages = [
            {"role": message["role"], "content": [_copied(part, media, digests) for part in message["content"]]}
            for message in sample.messages
        ]
        line: dict[str, Any] = {"id": sample.name, "messages": messages}
        line |= {"task": sample.task} if sample.task else {}
        line |= {"answer": sample.answer} if sample.answer is not None else {}
        lines.append(json.dumps(line | ({"speak": True} if sample.speak else {}), ensure_ascii=False) + "\n")
    text = "".join(lines).encode()
    (folder / LINES_FILE).write_bytes(text)
    digests[LINES_FILE] = hashlib.sha256(text).hexdigest()
    return dict(sorted(digests.items()))


def _copied(part: Mapping[str, Any], media: Path, digests: dict[str, str]) -> dict[str, Any]:
    """A part whose medium lies in the set, under a name made of what is in it."""
    kind = part["type"]
    source = part.get(kind) if kind in MEDIA else None
    if not isinstance(source, str) or source.startswith("data:"):
        return dict(part)
    path = Path(source)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"{MEDIA_FOLDER}/{digest[:20]}{path.suffix.lower()}"
    if name not in digests:
        shutil.copyfile(path, media.parent / name)
        digests[name] = digest
    return {**part, kind: name}


def _together(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _check_set(folder: Path) -> None:
    """Refuse a set whose files are not those of its receipt."""
    path, hint = folder / SET_FILE, "omnifp4 dataset OUT makes a set"
    if not path.is_file():
        raise OmniFP4Error(f"{folder}: is no calibration set: it has no {SET_FILE}", hint=hint)
    value = read_json(path)
    version = value.get("set_version") if isinstance(value, dict) else None
    if version != SET_VERSION:
        raise OmniFP4Error(f"{path}: a set of version {version!r}; this omnifp4 reads {SET_VERSION}", hint=hint)
    try:
        receipt = SetReceipt.model_validate(value)
    except ValidationError:
        raise OmniFP4Error(f"{path}: is damaged", hint=hint) from None
    if LINES_FILE not in receipt.files or receipt.sha256 != _together(receipt.files):
        raise OmniFP4Error(f"{path}: was changed after the set was made", hint="make the set again")
    for name, digest in receipt.files.items():
        file = folder / name
        if not file.is_file():
            raise OmniFP4Error(f"{folder}: file {name!r} of the set is missing", hint="make the set again")
        if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise OmniFP4Error(f"{folder}: file {name!r} was changed after the set was made", hint="make the set again")
