"""Conversations as tensors, of the same shapes in every batch, made by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from training.conversations import Author, Piece, Row, positions
from training.sounds import MOST_FRAMES
from training.towers import CHUNK, CHUNK_TOKENS


@dataclass(frozen=True)
class Space:
    """Shapes of a training batch, the same for all of them.

    Attributes:
        tokens: of a row.
        pictures: in all rows together; places that no row needs show more pictures, for the tower alone.
        sounds: the same.
    """

    tokens: int
    pictures: int
    sounds: int


def batch(
    rows: Sequence[Row],
    end: int,
    pad: int,
    speech: Any = None,
    space: Space | None = None,
    more: dict[str, Sequence[Any]] | None = None,
) -> dict[str, Any]:
    """Rows to tensors.

    Args:
        rows: examples.
        end: id of the end marker.
        pad: id that fills short rows.
        speech: `training.script.Script`, which adds what the talker learns.
        space: the tensors' shapes; without it they are as small as these rows allow.
        more: pictures and sounds that no row shows, for the rest of the space.

    Returns:
        ``ids``, ``labels`` (-100: not learned), ``positions (3, rows, tokens)``; for pictures ``number, rows, columns``
        and for sounds ``number, speed, start, frames``; ``picture_to (16 n)`` and ``sound_to (26 n)``: to which of the
        flattened tokens each feature goes; those that go nowhere have ``rows * tokens``.
    """
    longest = space.tokens if space else -(-max(map(row_length, rows)) // 8) * 8
    ids = np.full((len(rows), longest), pad)
    labels = np.full((len(rows), longest), -100)
    places = np.zeros((3, len(rows), longest), np.int64)
    plain = np.zeros(len(rows), bool)
    media: dict[str, list[Any]] = {"picture": [], "sound": []}
    go: dict[str, list[Any]] = {"picture": [], "sound": []}
    slots = {"picture": 16, "sound": MOST_FRAMES // CHUNK * CHUNK_TOKENS}
    for number, row in enumerate(rows):
        tail = Piece([*row.answer] if row.plain else [*row.answer, end])
        pieces = [*row.pieces, tail]
        flat = [token for piece in pieces for token in piece.ids]
        ids[number, : len(flat)] = flat
        places[:, number, : len(flat)] = positions(pieces)
        first = len(flat) - len(tail.ids)
        labels[number, first : len(flat)] = tail.ids
        plain[number] = row.plain
        place = number * longest
        for piece in row.pieces:
            if piece.kind != "text":
                order = np.arange(len(piece.ids))
                if piece.kind == "picture":
                    wide = piece.medium.columns // 2
                    order = order // wide * 4 + order % wide
                target = np.full(slots[piece.kind], len(rows) * longest)
                target[order] = place + np.arange(len(piece.ids))
                go[piece.kind].append(target)
                media[piece.kind].append(piece.medium)
            place += len(piece.ids)
    result: dict[str, Any] = {
        "ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "positions": torch.from_numpy(places),
        "plain": torch.from_numpy(plain),
    }  # fmt: skip
    for kind, one in (more or {}).items():
        media[kind] += one
        go[kind] += [np.full(slots[kind], len(rows) * longest)] * len(one)
    for kind, names in (("picture", ("number", "rows", "columns")), ("sound", ("number", "speed", "start", "frames"))):
        for name in names:
            values = [getattr(medium, name) for medium in media[kind]]
            result[f"{kind}_{name}"] = torch.tensor(values, dtype=torch.float32 if name == "speed" else torch.int64)
        together = np.concatenate(go[kind]) if go[kind] else np.zeros(0, np.int64)
        result[f"{kind}_to"] = torch.from_numpy(together)
    if speech is not None:
        result |= speech.batch(rows, longest, fixed=space is not None)
    return result


def row_length(row: Row) -> int:
    """Tokens of an example, the end marker included."""
    return sum(len(piece.ids) for piece in row.pieces) + len(row.answer) + (not row.plain)


def count_media(row: Row, kind: str) -> int:
    return sum(piece.kind == kind for piece in row.pieces)


class Batches(torch.utils.data.IterableDataset[Any]):
    """Endless batches, made by worker processes.

    Args:
        author: a function from a seed to an `Author`.
        shares: how many rows of each task are in a batch; ``text`` is plain text.
        seed: of the first worker.
        speech, space: as in `batch`.
    """

    def __init__(
        self,
        author: Any,
        shares: dict[str, int],
        seed: int,
        pad: int,
        speech: Any = None,
        space: Space | None = None,
    ) -> None:
        self.author, self.shares, self.seed, self.pad, self.speech = author, shares, seed, pad, speech
        self.space = space

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        author = self.author(self.seed + (worker.id if worker else 0))
        while True:
            rows: list[Row] = []
            for task, count in self.shares.items():
                rows += [self._row(author, task) for _ in range(count)]
            more = {}
            if self.space:
                for kind, room in (("picture", self.space.pictures), ("sound", self.space.sounds)):
                    room -= sum(count_media(row, kind) for row in rows)
                    # Too many by chance: rows with such media give way to text.
                    while room < 0:
                        last = max(number for number, row in enumerate(rows) if count_media(row, kind))
                        room += count_media(rows[last], kind)
                        rows[last] = author.plain()
                    make = author.picture if kind == "picture" else author.sound
                    more[kind] = [make()[0][1].medium for _ in range(room)]
            yield batch(rows, author.end, self.pad, self.speech, self.space, more)

    def _row(self, author: Author, task: str) -> Row:
        while True:
            row = author.plain() if task == "text" else author.conversation(task)
            if self.space is None or row_length(row) <= self.space.tokens:
                return row


def loader(batches: Batches, workers: int) -> Iterator[dict[str, Any]]:
    """The batches, some ahead."""
    return iter(
        torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None, pin_memory=False
        )
    )
