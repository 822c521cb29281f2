"""Writes the bundled calibration conversations. Run once; the result is package data.

    python -m omnifp4.calibration.build_samples OUT --data data.npz --tokenizer FOLDER

`data.npz` is the tiny model's training data (see training/data.py). Only its training part is used, so that nothing here
is in the evaluation's samples: recordings with index 5 and above, pictures whose number leaves no 4 by 5, and the first
nineteen twentieths of each text.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from omnifp4.calibration.written_samples import ARITHMETIC, CHARTS, WRITTEN, Scene
from omnifp4.checkpoint.output import write_text
from omnifp4.evaluation.build_samples import message_of

RATE: Final = 8000
SIDE: Final = 64
DIGIT_PICTURES: Final = 30
RECORDINGS: Final = 30
NUMBERS: Final = 6
"""Recordings of several digits, one behind the other."""
CONTINUED: Final = 36
LEAST_WORDS: Final = 100
MOST_WORDS: Final = 320
PAIRS: Final = 40

PICTURE_ASKED: Final = ("Which digit is in the picture?", "What number is shown?", "Read the digit.")
SOUND_ASKED: Final = ("Which digit is spoken?", "Which number do you hear?", "Transcribe the audio.")
PAIR_ASKED: Final[tuple[tuple[str, Callable[[int, int], int]], ...]] = (
    ("Add the two digits.", lambda a, b: a + b),
    ("Which of the two is larger?", max),
    ("Which of the two is smaller?", min),
)


@dataclass(frozen=True)
class Medium:
    """A file of the set: its kind, its name, and the digit that it shows or says."""

    kind: str
    name: str
    digit: int


def build(out: Path, data: Path, tokenizer: Any, seed: int) -> int:
    """Writes ``samples.jsonl`` and its media.

    Args:
        out: folder, made if it is missing.
        data: the training data.
        tokenizer: the one that its text was cut with.
        seed: of what is drawn.

    Returns:
        How many conversations there are.
    """
    draw = random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    arrays = np.load(data, allow_pickle=False)
    pictures, sounds = _pictures(out, arrays), _sounds(out, arrays, draw)
    lines = [*_written(), *_continued(arrays, tokenizer, draw), *_alone(pictures, sounds, draw)]
    lines += [*_scenes(out), *_numbers(out, arrays, draw), *_pairs(pictures, sounds, draw)]
    write_text(out / "samples.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return len(lines)


def _written() -> Iterator[dict[str, Any]]:
    for number, conversation in enumerate(WRITTEN):
        roles = ("user", "assistant") * len(conversation)
        messages = [{"role": role, "content": text} for role, text in zip(roles, conversation, strict=False)]
        yield {"id": f"written {number}", "messages": messages}
    for number, (asked, answer) in enumerate(ARITHMETIC):
        yield {"id": f"arithmetic {number}", "messages": asked, "answer": answer, "speak": number % 4 == 0}


def _continued(arrays: Any, tokenizer: Any, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Paragraphs, cut after about a third; the rest keeps the space that it begins with."""
    text = tokenizer.decode(arrays["text"].tolist())
    paragraphs = []
    for line in text.splitlines():
        # Sentences with words that the source has cut out are left out.
        sentences = [one.strip() for one in re.findall(r".*? [.!?](?= |$)", line) if "<unk>" not in one]
        paragraphs.append(" ".join(sentences))
    long = [one for one in paragraphs if LEAST_WORDS <= len(one.split()) <= MOST_WORDS]
    for number, line in enumerate(draw.sample(long, CONTINUED)):
        words = re.findall(r"\s*\S+", line)
        cut = draw.randint(len(words) // 4, len(words) // 2)
        asked = f"Continue: {''.join(words[:cut])}"
        yield {"id": f"continue {number}", "messages": asked, "answer": "".join(words[cut:])}


def _pictures(out: Path, arrays: Any) -> list[Medium]:
    from PIL import Image

    found, of_digit = [], dict.fromkeys(range(10), 0)
    for number, (picture, digit) in enumerate(zip(arrays["pictures"], arrays["picture_digits"].tolist(), strict=True)):
        if number % 5 == 4 or of_digit[digit] == DIGIT_PICTURES // 10:
            continue
        of_digit[digit] += 1
        name = f"digit_{digit}_{number}.png"
        grey = np.rint(picture * 255).astype(np.uint8)
        Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(out / name, optimize=True)
        found.append(Medium("image", name, digit))
    return found


def _recordings(arrays: Any) -> list[tuple[int, int]]:
    """Number and digit of what may be used."""
    usable = np.flatnonzero(arrays["wave_indices"] >= 5).tolist()
    return [(number, int(arrays["wave_digits"][number])) for number in usable]


def _wave(arrays: Any, number: int) -> Any:
    begin = 0 if number == 0 else int(arrays["wave_ends"][number - 1])
    return arrays["waves"][begin : int(arrays["wave_ends"][number])]


def _write(path: Path, wave: Any) -> None:
    from omnifp4.chat.errors import need

    soundfile: Any = need("soundfile", "writing audio")
    soundfile.write(path, wave, RATE, subtype="PCM_16")


def _sounds(out: Path, arrays: Any, draw: random.Random) -> list[Medium]:
    found = []
    for digit in range(10):
        of_digit = [number for number, said in _recordings(arrays) if said == digit]
        for number in draw.sample(of_digit, RECORDINGS // 10):
            name = f"spoken_{digit}_{number}.flac"
            _write(out / name, _wave(arrays, number))
            found.append(Medium("audio", name, digit))
    return found


def _numbers(out: Path, arrays: Any, draw: random.Random) -> Iterator[dict[str, Any]]:
    for number in range(NUMBERS):
        said = draw.sample(_recordings(arrays), 4 + number)
        pause = np.zeros(RATE // 5, np.int16)
        wave = np.concatenate([part for place, _ in said for part in (_wave(arrays, place), pause)])
        name = f"number_{number}.flac"
        _write(out / name, wave)
        answer = " ".join(str(digit) for _, digit in said)
        yield {
            "id": f"number {number}", "messages": message_of([("audio", name)], "Write down all digits that you hear."),
            "answer": answer, "speak": number % 3 == 0,
        }  # fmt: skip


def _alone(pictures: list[Medium], sounds: list[Medium], draw: random.Random) -> Iterator[dict[str, Any]]:
    for media, asked in ((pictures, PICTURE_ASKED), (sounds, SOUND_ASKED)):
        for number, medium in enumerate(media):
            yield {
                "id": f"alone {medium.name}", "messages": message_of([(medium.kind, medium.name)], draw.choice(asked)),
                "answer": str(medium.digit), "speak": number % 5 == 0,
            }  # fmt: skip


def _pairs(pictures: list[Medium], sounds: list[Medium], draw: random.Random) -> Iterator[dict[str, Any]]:
    for number in range(PAIRS):
        media = [draw.choice(pictures), draw.choice(sounds)]
        draw.shuffle(media)
        asked, work = PAIR_ASKED[number % len(PAIR_ASKED)]
        yield {
            "id": f"pair {number}", "messages": message_of([(one.kind, one.name) for one in media], asked),
            "answer": str(work(media[0].digit, media[1].digit)),
        }  # fmt: skip


def _scenes(out: Path) -> Iterator[dict[str, Any]]:
    for number, scene in enumerate(CHARTS):
        name = f"drawn_{number}.png"
        _draw(scene).save(out / name, optimize=True)
        for turn, (asked, answer) in enumerate(scene.asked):
            yield {"id": f"drawn {number}.{turn}", "messages": message_of([("image", name)], asked), "answer": answer}


def _draw(scene: Scene) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    pen = ImageDraw.Draw(image)
    for shape, colour, place in scene.shapes:
        getattr(pen, shape)(place, fill=colour)
    for text, (x, y), size in scene.texts:
        pen.text((x, y), text, fill="black", font=ImageFont.load_default(size))
    return image


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Write the bundled calibration conversations.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="the tiny model's folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import transformers

    auto: Any = transformers.AutoTokenizer
    tokenizer = auto.from_pretrained(options.tokenizer)
    print(f"{options.out}: {build(options.out, options.data, tokenizer, options.seed)} conversations")


if __name__ == "__main__":
    main()
