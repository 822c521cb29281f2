"""Conversations for training, as token ids with their media, positions and what is to be said.

What stands here must be what chat template and processor would give; a test compares the two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from training.data import Data
from training.phrases import (
    ADD,
    CONTINUE,
    LARGER,
    PICTURE,
    PICTURE_ADD,
    REPEAT,
    SMALLER,
    SOUND,
    SOUND_ADD,
    SYSTEMS,
    TEXT_ADD,
    TEXT_LARGER,
    TEXT_SMALLER,
    WORDS,
)  # fmt: skip
from training.sounds import HEARING, HOP, MOST_FRAMES
from training.towers import CHUNK, CHUNK_TOKENS

GRIDS = ((4, 4), (4, 4), (6, 6), (8, 8), (8, 8), (8, 8), (4, 6), (6, 4), (6, 8), (8, 6), (4, 8), (8, 4))
CONTINUED = (12, 40)
"""Fewest and most tokens of a continuation."""
TEXT_TOKENS = 96
"""Tokens of a piece of plain text."""


@dataclass
class Piece:
    """A part of a prompt.

    Attributes:
        ids: token ids; media are their placeholder, once for each token.
        kind: text, picture or sound.
        medium: what it shows; see `Picture` and `Sound`.
    """

    ids: list[int]
    kind: str = "text"
    medium: Any = None


@dataclass(frozen=True)
class Picture:
    number: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Sound:
    number: int
    speed: float
    start: int
    frames: int


@dataclass
class Row:
    """One example.

    Attributes:
        pieces: the prompt, up to the assistant's last header; media in their order.
        answer: token ids without the end marker.
        users: which pieces belong to a user, for the talker.
        spoken: digits to be said.
        plain: text without roles, of which every token is learned.
        task: for the evaluation.
    """

    pieces: list[Piece]
    answer: list[int]
    users: list[bool] = field(default_factory=list)
    spoken: tuple[int, ...] = ()
    plain: bool = False
    task: str = ""


def sound_tokens(frames: int) -> int:
    """Tokens that the audio tower makes of so many mel frames."""
    rest = frames % CHUNK
    for _ in range(3):
        rest = (rest + 1) // 2
    return frames // CHUNK * CHUNK_TOKENS + rest


def positions(pieces: Sequence[Piece]) -> np.ndarray[Any, Any]:
    """Time, height and width of every token, ``(3, tokens)``."""
    parts, next_one = [], 0
    for piece in pieces:
        count = len(piece.ids)
        if piece.kind == "picture":
            wide, high = piece.medium.columns // 2, piece.medium.rows // 2
            place = np.arange(count)
            parts.append(np.stack([np.zeros(count, int), place // wide, place % wide]) + next_one)
            next_one += max(wide, high)
        else:
            parts.append(np.tile(np.arange(count), (3, 1)) + next_one)
            next_one += count
    return np.concatenate(parts, axis=1)


class Author:
    """Writes conversations.

    Args:
        data: pictures, recordings and text.
        tokenizer: the tiny model's.
        config: of the whole model, for token ids.
        test: use what is held out, unvaried.
        seed: of everything that is drawn.
    """

    def __init__(self, data: Data, tokenizer: Any, config: Any, *, test: bool, seed: int) -> None:
        self.data, self.tokenizer, self.config, self.test = data, tokenizer, config, test
        self.random = random.Random(seed)
        self.encode = lru_cache(maxsize=20_000)(lambda text: tuple(tokenizer(text)["input_ids"]))
        thinker = config["thinker_config"]
        self.start, self.end = config["im_start_token_id"], config["im_end_token_id"]
        self.picture_token, self.sound_token = thinker["image_token_id"], thinker["audio_token_id"]
        self.around_picture = thinker["vision_start_token_id"], thinker["vision_end_token_id"]
        self.around_sound = thinker["audio_start_token_id"], thinker["audio_end_token_id"]
        self.pictures = data.picture_numbers(test).tolist()
        self.sounds = data.wave_numbers(test).tolist()
        ends = data.wave_ends
        self.lengths = np.diff(np.concatenate([[0], ends])) / 8000
        self.text = data.test_text if test else data.text
        self.vocabulary = self.text_words()
        self.newlines = {token for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token])}
        self.stops = {token for token in range(len(tokenizer)) if tokenizer.decode([token]) in (".", "!", "?")}

    def picture(self, number: int | None = None, grid: tuple[int, int] | None = None) -> tuple[list[Piece], int]:
        number = self.random.choice(self.pictures) if number is None else number
        rows, columns = grid or ((4, 4) if self.test else self.random.choice(GRIDS))
        medium = Picture(number, rows, columns)
        before, after = self.around_picture
        tokens = [self.picture_token] * (rows * columns // 4)
        pieces = [Piece([before]), Piece(tokens, "picture", medium), Piece([after])]
        return pieces, int(self.data.picture_digits[number])

    def sound(self, number: int | None = None) -> tuple[list[Piece], int]:
        number = self.random.choice(self.sounds) if number is None else number
        seconds = min(1.3, self.lengths[number])
        if self.test:
            speed, start, frames = 1.0, 0, int(seconds * HEARING) // HOP
        else:
            speed = self.random.uniform(0.8, 1.25)
            lead = tail = 0.0
            if self.random.random() < 0.6:
                lead, tail = self.random.uniform(0, 0.4), self.random.uniform(0, 0.5)
            start = int(lead * HEARING)
            frames = min(MOST_FRAMES, max(10, int((lead + seconds / speed + tail) * 100)))
        medium = Sound(number, speed, start, frames)
        before, after = self.around_sound
        pieces = [Piece([before]), Piece([self.sound_token] * sound_tokens(frames), "sound", medium), Piece([after])]
        return pieces, int(self.data.wave_digits[number])

    def text_words(self) -> list[str]:
        """The text's words, in their order."""
        words: list[str] = self.tokenizer.decode(self.text.tolist()).split()
        return words

    def words(self, least: int, most: int) -> list[int]:
        """Some words of the text, in one line, beginning with a letter; in training half of them from anywhere.

        Words that do not follow from one another can be repeated only by who looks at them.
        """
        while True:
            count = self.random.randint(least, most)
            if not self.test and self.random.random() < 0.5:
                some = self.random.choices(self.vocabulary, k=count)
            else:
                place = self.random.randrange(len(self.vocabulary) - most)
                some = self.vocabulary[place : place + count]
            if some[0][0].isalpha():
                return list(self.encode.__wrapped__(" ".join(some)))

    def say(self, text: str) -> Piece:
        return Piece(list(self.encode(text)))

    def question(self, task: str) -> tuple[list[Piece], list[int], tuple[int, ...], str]:
        """Content of a user's message, the answer's ids, what is spoken, and the task's name."""
        choose = self.random.choice
        if task in ("picture", "sound"):
            media, digit = self.picture() if task == "picture" else self.sound()
            asked = self.say(choose(PICTURE if task == "picture" else SOUND))
            if not self.test and self.random.random() < 0.1:
                asked = Piece(self.words(2, 6))
            return self.mixed(media, asked), *self.number(digit), task
        if task == "two":
            # Pictures are learned more slowly.
            makers = self.random.choices((self.picture, self.sound), (1, 1) if self.test else (3, 2), k=2)
            (one, a), (two, b) = makers[0](), makers[1]()
            phrases, value, kind = choose(
                ((ADD, a + b, "add"), (LARGER, max(a, b), "larger"), (SMALLER, min(a, b), "smaller"))
            )
            asked = self.say(choose(phrases))
            names = sorted("picture" if maker == self.picture else "sound" for maker in makers)
            return self.mixed(one + two, asked), *self.number(value), f"{kind} {names[0]} {names[1]}"
        if task == "arithmetic":
            a, b = self.random.randrange(10), self.random.randrange(10)
            kind = self.random.random()
            if kind < 0.4 and not self.test:
                media, a = self.picture() if kind < 0.2 else self.sound()
                asked = self.say(choose(PICTURE_ADD if kind < 0.2 else SOUND_ADD).format(b=b))
                return self.mixed(media, asked), *self.number(a + b), "add text"
            phrases, value = choose(((TEXT_ADD, a + b), (TEXT_LARGER, max(a, b)), (TEXT_SMALLER, min(a, b))))
            return [self.say(choose(phrases).format(a=a, b=b))], *self.number(value), "arithmetic"
        if task == "repeat":
            before = list(self.encode(choose(REPEAT).strip()))
            kind = self.random.random()
            digits: tuple[int, ...] = ()
            if kind < 0.4:
                digits = tuple(self.random.randrange(10) for _ in range(self.random.randint(1, 8)))
                text = " " + choose((" ", ", ")).join(map(str, digits))
                tokens = list(self.encode.__wrapped__(text))
            elif kind < 0.6:
                digits = tuple(self.random.randrange(10) for _ in range(self.random.randint(1, 6)))
                tokens = list(self.encode.__wrapped__(" " + " ".join(WORDS[digit] for digit in digits)))
            else:
                tokens = list(self.encode.__wrapped__(" " + self.tokenizer.decode(self.words(1, 8))))
            answer = list(self.encode.__wrapped__(self.tokenizer.decode(tokens)[1:]))
            return [Piece(before + tokens)], answer, digits, "repeat"
        before = list(self.encode(choose(CONTINUE).strip()))
        while True:
            place = self.random.randrange(len(self.text) - 200)
            tokens = self.text[place : place + 100].tolist()
            if tokens[0] in self.newlines or not self.tokenizer.decode(tokens[:1]).startswith(" "):
                continue
            count = self.random.randint(8, 40)
            if any(token in self.newlines for token in tokens[: count + 1]):
                continue
            answer = []
            for token in tokens[count : count + CONTINUED[1]]:
                if token in self.newlines:
                    break
                answer.append(token)
                if token in self.stops and len(answer) >= CONTINUED[0]:
                    break
            if len(answer) >= CONTINUED[0]:
                return [Piece(before + tokens[:count])], answer, (), "continue"

    def number(self, value: int) -> tuple[list[int], tuple[int, ...]]:
        text = str(value)
        return list(self.encode(text)), tuple(map(int, text))

    def mixed(self, media: list[Piece], asked: Piece) -> list[Piece]:
        return [*media, asked] if self.random.random() < 0.7 else [asked, *media]

    def conversation(self, task: str) -> Row:
        """A conversation that ends with this task, mostly of one turn."""
        pieces: list[Piece] = []
        users: list[bool] = []
        if self.random.random() < 0.3:
            text = self.random.choice(SYSTEMS)
            pieces.append(Piece([self.start, *self.encode("system\n" + text), self.end, *self.encode("\n")]))
            users.append(False)
        turns = [task]
        if not self.test and self.random.random() < 0.08:
            turns.insert(0, self.random.choice(("picture", "sound", "arithmetic", "repeat")))
        for number, turn in enumerate(turns):
            content, answer, spoken, name = self.question(turn)
            header = Piece([self.start, *self.encode("user\n")])
            asked = [header, *content, Piece([self.end, *self.encode("\n")])]
            pieces += asked
            users += [True] * len(asked)
            header = Piece([self.start, *self.encode("assistant\n")])
            if number < len(turns) - 1:
                header.ids += [*answer, self.end, *self.encode("\n")]
            pieces.append(header)
            users.append(False)
        return Row(pieces, answer, users, spoken, task=name)

    def plain(self) -> Row:
        place = self.random.randrange(len(self.text) - TEXT_TOKENS)
        return Row([], self.text[place : place + TEXT_TOKENS].tolist(), plain=True, task="text")
