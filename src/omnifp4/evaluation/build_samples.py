"""Writes evaluation samples from open data. Run once; the result is package data.

    python -m omnifp4.evaluation.build_samples OUT --recordings FSDD/recordings --text FILE… [--all]

Only what the tiny model never learned from: recordings with index 0 to 4 of each speaker and digit (FSDD's own test
split), every fifth of scikit-learn's handwritten digits, the last twentieth of each text.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.output import write_text

HELD_OUT_RECORDINGS: Final = 5
HELD_OUT_PICTURES: Final = 5
HELD_OUT_TEXT: Final = 1 / 20
SIDE: Final = 64
"""Pixels of a picture: eight for each of the original's."""

PICTURE_ASKED: Final = ("Which digit is in the picture?", "What number is shown?", "Which digit is this?")
SOUND_ASKED: Final = ("Which digit is spoken?", "Which number do you hear?", "What does the speaker say?")
ADD_ASKED: Final = ("Add the two digits.", "What is the sum of the two digits?")
LARGER_ASKED: Final = ("Which digit is larger?", "Which of the two is larger?")
SMALLER_ASKED: Final = ("Which digit is smaller?", "Which of the two is smaller?")


@dataclass(frozen=True)
class Counts:
    """Samples of each kind.

    Attributes:
        pictures, recordings: of each digit (recordings: of each digit and speaker).
        pairs: of each comparison and pair of kinds of media; twice as many additions.
        arithmetic, repeat, continued: in text.
        spoken: digits whose answer is spoken too, half of them seen and half heard.
        long: repetitions of eight digits that are spoken too.
    """

    pictures: int
    recordings: int
    pairs: int
    arithmetic: int
    repeat: int
    continued: int
    spoken: int
    long: int


BUNDLED: Final = Counts(
    pictures=13, recordings=2, pairs=17, arithmetic=100, repeat=100, continued=32, spoken=24, long=3
)
ALL: Final = Counts(
    pictures=1000, recordings=5, pairs=60, arithmetic=300, repeat=300, continued=200, spoken=200, long=20
)

Medium = tuple[str, str, int]
"""Kind (``image`` or ``audio``), file name, digit."""


def build(out: Path, recordings: Path, texts: list[Path], counts: Counts, seed: int) -> int:
    """Writes ``samples.jsonl`` and its media.

    Args:
        out: folder, made if it is missing.
        recordings: folder of ``{digit}_{speaker}_{index}.wav``.
        texts: UTF-8 files.
        counts: how many of each.
        seed: of what is drawn.

    Returns:
        How many samples there are.
    """
    draw = random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    pictures = write_pictures(out, counts.pictures)
    sounds = copy_recordings(out, recordings, counts.recordings)
    lines = [*_alone(draw, pictures, sounds, counts), *_pairs(draw, pictures, sounds, counts)]
    lines += [*_text(draw, texts, counts)]
    write_text(out / "samples.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return len(lines)


def write_pictures(out: Path, of_each: int) -> list[Medium]:
    """Held-out handwritten digits as PNG, white on black, scaled up without smoothing."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    found: list[Medium] = []
    seen = dict.fromkeys(range(10), 0)
    for number in range(HELD_OUT_PICTURES - 1, len(digits.images), HELD_OUT_PICTURES):
        digit = int(digits.target[number])
        if seen[digit] == of_each:
            continue
        seen[digit] += 1
        grey = np.rint(digits.images[number] / 16 * 255).astype(np.uint8)
        name = f"{digit}_{number}.png"
        Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(out / name, optimize=True)
        found.append(("image", name, digit))
    return found


def copy_recordings(out: Path, recordings: Path, of_each: int) -> list[Medium]:
    """Held-out recordings, as they are."""
    found: list[Medium] = []
    for path in sorted(recordings.glob("*.wav")):
        digit, _, index = path.stem.split("_")
        if int(index) < min(of_each, HELD_OUT_RECORDINGS):
            shutil.copyfile(path, out / path.name)
            found.append(("audio", path.name, int(digit)))
    return found


def _total(a: int, b: int) -> int:
    return a + b


Operation = Callable[[int, int], int]

TEXT_ASKED: Final[tuple[tuple[str, Operation], ...]] = (
    ("What is {a} plus {b}?", _total),
    ("Which is larger, {a} or {b}?", max),
    ("Which is smaller, {a} or {b}?", min),
)
PAIRS_ASKED: Final[tuple[tuple[str, tuple[str, ...], Operation], ...]] = (
    ("add", ADD_ASKED, _total),
    ("larger", LARGER_ASKED, max),
    ("smaller", SMALLER_ASKED, min),
)


def message_of(media: Sequence[tuple[str, str]], asked: str) -> list[dict[str, Any]]:
    """A conversation of one turn: media as kind and file name, and then what is asked."""
    parts: list[dict[str, Any]] = [{"type": kind, kind: name} for kind, name in media]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": asked}]}]


def _alone(
    draw: random.Random, pictures: list[Medium], sounds: list[Medium], counts: Counts
) -> Iterator[dict[str, Any]]:
    for task, media, asked in (("picture digit", pictures, PICTURE_ASKED), ("spoken digit", sounds, SOUND_ASKED)):
        aloud = set(draw.sample(range(len(media)), min(len(media), counts.spoken // 2)))
        for number, medium in enumerate(media):
            line: dict[str, Any] = {"id": f"{task} {medium[1]}", "task": task}
            line |= {"messages": message_of([medium[:2]], draw.choice(asked)), "answer": str(medium[2])}
            yield line | ({"speak": True} if number in aloud else {})


def _pairs(
    draw: random.Random, pictures: list[Medium], sounds: list[Medium], counts: Counts
) -> Iterator[dict[str, Any]]:
    for kinds in ((pictures, sounds), (pictures, pictures), (sounds, sounds)):
        for task, asked, work in PAIRS_ASKED:
            # Two comparisons share a task; one addition has its own.
            for _ in range(counts.pairs * (2 if task == "add" else 1)):
                media = [draw.choice(kind) for kind in kinds]
                draw.shuffle(media)
                value = work(media[0][2], media[1][2])
                name = f"{task} {media[0][1]} {media[1][1]} {draw.randrange(10**6)}"
                task_name = "add two" if task == "add" else "compare two"
                messages = message_of([medium[:2] for medium in media], draw.choice(asked))
                yield {"id": name, "task": task_name, "messages": messages, "answer": str(value)}


def _text(draw: random.Random, texts: list[Path], counts: Counts) -> Iterator[dict[str, Any]]:
    for number in range(counts.arithmetic):
        a, b = draw.randrange(10), draw.randrange(10)
        asked, work = draw.choice(TEXT_ASKED)
        yield {
            "id": f"arithmetic {number}", "task": "arithmetic",
            "messages": message_of([], asked.format(a=a, b=b)), "answer": str(work(a, b)),
        }  # fmt: skip
    for number in range(counts.repeat):
        digits = " ".join(str(draw.randrange(10)) for _ in range(1 + number % 8))
        line = {
            "id": f"repeat {number}",
            "task": "repeat",
            "messages": message_of([], f"Repeat: {digits}"),
            "answer": digits,
        }
        yield line | ({"speak": True} if number % 8 == 7 and number // 8 < counts.long else {})
    for number, (before, after) in enumerate(_continued(draw, texts, counts.continued)):
        yield {"id": f"continue {number}", "messages": message_of([], f"Continue: {before}"), "answer": after}


def _continued(draw: random.Random, texts: list[Path], count: int) -> Iterator[tuple[str, str]]:
    """Sentences of held-out text in two halves; the second keeps the space that it begins with."""
    lines: list[str] = []
    for path in texts:
        text = path.read_text("utf-8")
        held = text[text.index("\n", int(len(text) * (1 - HELD_OUT_TEXT))) :]
        sentences = (one.strip() for line in held.splitlines() for one in re.findall(r".*? [.!?](?= |$)", line))
        lines += [one for one in sentences if len(one.split()) >= 16 and "<unk>" not in one]
    for line in draw.sample(lines, min(count, len(lines))):
        words = re.findall(r"\s*\S+", line)
        cut = draw.randint(6, min(20, len(words) - 8))
        yield "".join(words[:cut]), "".join(words[cut : cut + 24])


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Write evaluation samples from open data.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--recordings", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--all", action="store_true", help="every held-out picture and recording")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = build(options.out, options.recordings, options.text, ALL if options.all else BUNDLED, options.seed)
    print(f"{options.out}: {count} samples")


if __name__ == "__main__":
    main()
