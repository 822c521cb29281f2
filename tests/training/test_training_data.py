"""What is held out stays out, and the same seed gives the same examples."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")


def test_what_is_held_out_is_never_learned(data: Any, config: Any, tokenizer: Any) -> None:
    from training.conversations import Author

    learned, held_out = (Author(data, tokenizer, config, test=test, seed=0) for test in (False, True))
    assert len(held_out.pictures) == 359
    assert len(learned.pictures) == 1438
    assert len(learned.sounds) == len(held_out.sounds) == 40
    assert set(data.wave_indices[learned.sounds]) == {7}
    assert set(data.wave_indices[held_out.sounds]) == {0}
    for task in ("picture", "sound", "two", "arithmetic"):
        for _ in range(40):
            for piece in learned.conversation(task).pieces:
                if piece.kind != "text":
                    allowed = learned.pictures if piece.kind == "picture" else learned.sounds
                    assert piece.medium.number in allowed


def test_answers_are_right(data: Any, config: Any, tokenizer: Any) -> None:
    from training.conversations import Author

    author = Author(data, tokenizer, config, test=True, seed=1)
    seen = set()
    for _ in range(60):
        row = author.conversation("two")
        digits = [
            int((data.picture_digits if piece.kind == "picture" else data.wave_digits)[piece.medium.number])
            for piece in row.pieces
            if piece.kind != "text"
        ]
        verb = row.task.split()[0]
        seen.add(verb)
        value = {"add": sum(digits), "larger": max(digits), "smaller": min(digits)}[verb]
        assert tokenizer.decode(row.answer) == str(value)
        assert row.spoken == tuple(map(int, str(value)))
    assert seen == {"add", "larger", "smaller"}


def test_a_seed_decides_the_batches(data: Any, config: Any, tokenizer: Any) -> None:
    from training.batches import Batches, Space
    from training.conversations import Author

    author = partial(author_of, Author, data, tokenizer, config)
    shares = {"picture": 3, "sound": 2, "two": 3, "text": 2}
    one, same, other = (next(iter(Batches(author, shares, seed, 0, space=Space(96, 16, 16)))) for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["ids"], other["ids"])
    # One recorded step serves all batches.
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}


def author_of(author: Any, data: Any, tokenizer: Any, config: Any, seed: int) -> Any:
    return author(data, tokenizer, config, test=False, seed=seed)


def test_the_eyes_teacher_leaves_out_what_it_says(data: Any) -> None:
    """The closed form of leave-one-out is what leaving each picture out gives."""
    from training.teacher import Teacher

    few = replace(data, pictures=data.pictures[:60], picture_digits=data.picture_digits[:60])
    teacher = Teacher(few, "cpu")
    numbers = few.picture_numbers(False)
    pictures = torch.from_numpy(few.pictures[numbers]).flatten(1).double()
    digits = torch.from_numpy(few.picture_digits[numbers])
    wanted = torch.eye(10, dtype=torch.float64)[digits]
    kernel = torch.exp(-torch.cdist(pictures, pictures).square() / (2 * teacher.width**2))
    right = 0
    for out in range(len(numbers)):
        rest = [number for number in range(len(numbers)) if number != out]
        ridge = teacher.ridge * torch.eye(len(rest), dtype=torch.float64)
        weights = torch.linalg.solve(kernel[rest][:, rest] + ridge, wanted[rest])
        right += int((kernel[out, rest] @ weights).argmax()) == int(digits[out])
    assert teacher.accuracy == pytest.approx(right / len(numbers))
    shares = teacher(torch.from_numpy(few.pictures[numbers]))
    assert torch.allclose(shares.sum(1), torch.ones(len(numbers)))


def test_pictures_between_others_are_pictures_of_the_same_digit(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures that must keep their digit keep it; the others lie between any two."""
    from training import teacher

    album = teacher.Album(data, "cpu")
    numbers = torch.from_numpy(data.picture_numbers(False))
    one = album.places[numbers[data.picture_digits[numbers] == 3]].repeat(4)[:400]
    assert set(album.digits[one].tolist()) == {3}
    kept, again, free = (
        album.between(one, torch.full((400,), may), torch.Generator().manual_seed(2)) for may in (False, False, True)
    )
    assert torch.equal(kept, again)
    assert kept.shape == (400, 8, 8)
    assert float(kept.min()) >= 0
    assert float(kept.max()) <= 1
    known = torch.cdist(kept.flatten(1), album.pictures.flatten(1)).amin(1) < 1e-5
    assert 20 < int(known.sum()) < 100, "an eighth is shown as it is"
    monkeypatch.setattr(teacher, "WIDTHS", (2.5,))
    monkeypatch.setattr(teacher, "RIDGES", (1e-2,))
    named = teacher.Teacher(data, "cpu")
    right, mixed = (float((named(made).argmax(1) == 3).float().mean()) for made in (kept, free))
    assert right > 0.95
    assert mixed < right


def test_varied_pictures_hold_files_as_they_are(data: Any) -> None:
    """A share of the varied pictures is the 8 x 8 file scaled up, and nothing else."""
    from training import pictures

    digits = torch.from_numpy(data.pictures[:200])
    size = torch.full((200,), 8)
    varied = pictures.draw(digits, size, size, True, torch.Generator().manual_seed(0))
    blocks = torch.kron(digits, torch.ones(16, 16))[:, None]
    assert torch.equal(pictures.draw(digits, size, size, False, None)[:, :1], blocks)
    same, inverted = ((varied - one).abs().amax((1, 2, 3)) < 1e-5 for one in (blocks, 1 - blocks))
    assert 10 < int(same.sum()) < 40
    assert 3 < int(inverted.sum()) < 25


def test_only_some_tokens_of_plain_text_are_others() -> None:
    from training.thinker import WRONG, slipped

    ids = torch.zeros(100, 100, dtype=torch.long)
    read = slipped(ids, 50, torch.Generator().manual_seed(0))
    assert float((read != ids).float().mean()) == pytest.approx(WRONG, abs=0.02)
    assert int(read.max()) == 49


def test_text_weighs_less_when_it_was_read_often() -> None:
    from training.thinker import PASSES, TEXT_WEIGHT, text_weight

    early, late, later = (float(text_weight(10, passes * 100, 96_000)) for passes in (1, 2 * PASSES, 4 * PASSES))
    assert early == TEXT_WEIGHT
    assert late == pytest.approx(TEXT_WEIGHT / 4)
    assert later == pytest.approx(TEXT_WEIGHT / 16)
