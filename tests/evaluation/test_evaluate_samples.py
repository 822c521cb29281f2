"""The bundled samples: what their files say is what their answers say, and nothing in them was learned from."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from evaluation_data import SAMPLES

from omnifp4.evaluation.build_samples import BUNDLED, Counts, build, main
from omnifp4.evaluation.data import read_data

LINES = [json.loads(line) for line in (SAMPLES / "samples.jsonl").read_text("utf-8").splitlines()]


def media(line: dict[str, Any]) -> list[str]:
    return [part[part["type"]] for part in line["messages"][0]["content"] if part["type"] != "text"]


def asked(line: dict[str, Any]) -> str:
    return next(part["text"] for part in line["messages"][0]["content"] if part["type"] == "text")


def test_every_task_can_tell_one_point() -> None:
    """A hundred samples or more: one answer is then a point at most."""
    tasks = Counter(line["task"] for line in LINES if "task" in line)
    assert set(tasks) == {"picture digit", "spoken digit", "add two", "compare two", "arithmetic", "repeat"}
    assert min(tasks.values()) >= 100
    assert sum(line.get("speak", False) for line in LINES) == BUNDLED.spoken + BUNDLED.long


def test_answers_are_those_of_the_files() -> None:
    for line in LINES:
        digits = [int(Path(name).name[0]) for name in media(line)]
        if line.get("task") in ("picture digit", "spoken digit"):
            assert line["answer"] == str(digits[0])
        elif line.get("task") in ("add two", "compare two"):
            words = asked(line)
            work: Any = sum if re.search("Add|sum", words) else max if "larger" in words else min
            assert line["answer"] == str(work(digits)), line["id"]
        elif line.get("task") == "arithmetic":
            a, b = map(int, re.findall(r"\d", asked(line)))
            work = sum if "plus" in asked(line) else max if "larger" in asked(line) else min
            assert line["answer"] == str(work((a, b)))
        elif line.get("task") == "repeat":
            assert asked(line) == f"Repeat: {line['answer']}"


def test_they_are_held_out_whole_and_free() -> None:
    used = {name for line in LINES for name in media(line)}
    files = {path.name for path in SAMPLES.iterdir()} - {"samples.jsonl", "README.md"}
    assert used == files, "every file is used, and every used file is there"
    for name in files:
        numbers = Path(name).stem.split("_")
        assert int(numbers[-1]) < 5 if name.endswith(".wav") else int(numbers[-1]) % 5 == 4, name
    told = (SAMPLES / "README.md").read_text()
    assert all(licence in told for licence in ("CC BY-SA 4.0", "CC BY 4.0", "CC BY-SA 3.0"))
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) < 2_000_000
    assert len(read_data("bundled")) == len(LINES)


def test_pictures_are_scikit_learns() -> None:
    np, datasets = pytest.importorskip("numpy"), pytest.importorskip("sklearn.datasets")
    image = pytest.importorskip("PIL.Image")

    digits = datasets.load_digits()
    pictures = sorted(SAMPLES.glob("*.png"))
    for path in pictures[::10]:
        digit, number = map(int, path.stem.split("_"))
        assert digits.target[number] == digit
        shown = np.asarray(image.open(path))
        assert shown.shape == (64, 64)
        assert (shown[::8, ::8] == np.rint(digits.images[number] / 16 * 255)).all()


def test_building_is_seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    few = Counts(pictures=1, recordings=1, pairs=1, arithmetic=3, repeat=9, continued=2, spoken=4, long=1)
    text = tmp_path / "text.txt"
    words = " ".join(f"word{number}" for number in range(30))
    text.write_text("\n".join(f"sentence {number} {words} ." for number in range(200)) + "\n")
    made = []
    for name in ("a", "b"):
        assert build(tmp_path / name, SAMPLES, [text], few, seed=3) == 10 + 60 + 12 + 3 + 9 + 2
        made.append((tmp_path / name / "samples.jsonl").read_text())
    assert made[0] == made[1]
    lines = [json.loads(line) for line in made[0].splitlines()]
    assert sum(line.get("speak", False) for line in lines) == 5
    continued = [line for line in lines if "task" not in line]
    assert all(int(asked(line).split()[2]) >= 190 for line in continued), "the last twentieth of the text"
    assert all(line["answer"].startswith(" ") for line in continued)
    monkeypatch.setattr(sys, "argv", ["build", str(tmp_path / "c"), "--recordings", str(SAMPLES), "--text", str(text)])
    main()
    # This text has few sentences in its last twentieth; everything else is as in the bundle.
    again = [json.loads(line) for line in (tmp_path / "c" / "samples.jsonl").read_text().splitlines()]
    assert [line for line in again if "task" in line] == [line for line in LINES if "task" in line]
