"""What the talker reads and learns to say: codes of recordings, put together to answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.conversations import Piece, Row, positions
from training.data import VOICES, Data

MOST_SECONDS = 0.85
"""Longer recordings are no targets: they hold hesitation."""
HEADER = 9
"""Positions between the user's part and the first frame."""
TAKES = 12
"""Recordings of each digit that a voice learns from: those in which the ear hears it best through the codec."""
FIRST_FRAMES, FIRST_WEIGHT = 2, 4.0
"""Weight of the first frames of each digit."""
TOKENS = 160
"""Positions of a row in training."""
ROW_FRAMES = 24
"""Frames of a batch in training, for each of its rows."""
NOTHING_FRAMES = 3
"""Frames of silence for a text that has no digits."""


class Script:
    """Puts together what is said.

    Args:
        data: whose recordings are repeated.
        codes: of the recordings, by number; each ``(frames, groups)``, the last frame silent.
        clear: how clearly each of them says its digit, by number.
        quiet: codes of a frame of silence, ``(groups,)``.
        config: of the whole model.
        seed: of voices, recordings and pauses.
    """

    def __init__(
        self, data: Data, codes: dict[int, Any], clear: dict[int, float], quiet: Any, config: Any, seed: int
    ) -> None:
        self.codes, self.quiet, self.config = codes, quiet, config
        self.random = random.Random(seed)
        self.takes: dict[tuple[str, int], list[int]] = {}
        speakers = data.speakers.tolist()
        lengths = np.diff(np.concatenate([[0], data.wave_ends])) / 8000
        for voice, speaker in VOICES.items():
            for digit in range(10):
                same = (data.wave_speakers == speakers.index(speaker)) & (data.wave_digits == digit)
                numbers = [int(one) for one in np.flatnonzero(same & (lengths < MOST_SECONDS)) if int(one) in codes]
                if not numbers:
                    raise SystemExit(f"no training recording of {digit} by {speaker}")
                self.takes[voice, digit] = sorted(numbers, key=lambda one: -clear[one])[:TAKES]

    def frames(self, voice: str, digits: Sequence[int]) -> tuple[Any, Any]:
        """Codes of digits said one after the other, ``(frames, groups)``, and the weight of each frame, ``(frames,)``.

        A digit is decided in its first frames, so these weigh more: what follows is one recording's course.
        """
        if not digits:
            return np.tile(self.quiet, (NOTHING_FRAMES, 1)), np.ones(NOTHING_FRAMES, np.float32)
        parts, weights = [], []
        for number, digit in enumerate(digits):
            one = self.codes[self.random.choice(self.takes[voice, digit])]
            parts.append(one if number == len(digits) - 1 or self.random.random() < 0.3 else one[:-1])
            weights.append(np.ones(len(parts[-1]), np.float32))
            weights[-1][:FIRST_FRAMES] = FIRST_WEIGHT
        return np.concatenate(parts), np.concatenate(weights)

    def batch(
        self,
        rows: Sequence[Row],
        longest: int,
        voices: Sequence[str] | None = None,
        *,
        empty: bool = False,
        fixed: bool = False,
    ) -> dict[str, Tensor]:
        """What the talker reads and learns; see `inputs`.

        Args:
            rows: examples.
            longest: tokens of a row of the thinker's batch.
            voices: of each row; drawn if not given.
            empty: without frames, to start generating from.
            fixed: shapes that depend on the number of rows only: `TOKENS` of a row, `ROW_FRAMES` times the rows frames
                for the code predictor; what is longer is cut.
        """
        made = []
        for number, row in enumerate(rows):
            voice = voices[number] if voices else self.random.choice(list(VOICES))
            nothing = np.zeros((0, len(self.quiet)), np.uint16), np.zeros(0, np.float32)
            frames, weights = nothing if empty else self.frames(voice, row.spoken)
            made.append(self._row(row, number * longest, voice, frames, weights))
        if fixed:
            made = [
                {name: one[name][:, :TOKENS] if name == "positions" else one[name][:TOKENS] for name in one}
                for one in made
            ]
        size = TOKENS if fixed else max(one["text"].shape[0] for one in made)
        result = {}
        for name, filler in (
            ("text", self.config["tts_pad_token_id"]),
            ("codec", -1),
            ("media", -1),
            ("codes", -1),
            ("next", -1),
            ("label", -100),
            ("weight", 0),
        ):
            parts = []
            for one in made:
                value = one[name]
                padding = [(0, size - value.shape[0])] + [(0, 0)] * (value.ndim - 1)
                parts.append(np.pad(value, padding, constant_values=filler))
            result[f"talk_{name}"] = torch.from_numpy(np.stack(parts))
        places = [np.pad(one["positions"], [(0, 0), (0, size - one["positions"].shape[1])]) for one in made]
        result["talk_positions"] = torch.from_numpy(np.stack(places, axis=1))
        result["talk_length"] = torch.tensor([one["text"].shape[0] for one in made])
        following = result.pop("talk_next").flatten(0, 1)
        due = (following[:, 0] >= 0).nonzero()[:, 0]
        if fixed:
            due = due[: ROW_FRAMES * len(rows)]
            due = F.pad(due, (0, ROW_FRAMES * len(rows) - len(due)), value=-1)
        at = due.clamp(min=0)
        result["talk_due"], result["talk_next"] = at, following[at].clamp(min=0)
        result["talk_due_weight"] = result["talk_weight"].flatten()[at] * (due >= 0)
        return result

    def _row(self, row: Row, base: int, voice: str, frames: Any, weights: Any) -> dict[str, Any]:
        config, talker = self.config, self.config["talker_config"]
        text: list[int] = []
        media: list[int] = []
        heard: list[Piece] = []
        place = base
        for piece, user in zip(row.pieces, row.users, strict=True):
            if user:
                heard.append(piece)
                text += piece.ids
                media += [-1] * len(piece.ids) if piece.kind == "text" else range(place, place + len(piece.ids))
            place += len(piece.ids)
        users = len(text)
        newline = row.pieces[-1].ids[-1]
        pad, eos = config["tts_pad_token_id"], config["tts_eos_token_id"]
        text += [
            config["im_start_token_id"],
            config["assistant_token_id"],
            newline,
            *[pad] * 4,
            config["tts_bos_token_id"],
            row.answer[0],
        ]
        codec = [-1] * (users + 3) + [
            talker["codec_nothink_id"], talker["codec_think_bos_id"], talker["codec_think_eos_id"],
            talker["speaker_id"][voice], talker["codec_pad_id"], talker["codec_bos_id"],
        ]  # fmt: skip
        count = len(frames)
        trailing = [*row.answer[1:], eos]
        text += (trailing + [pad] * count)[:count]
        total = users + HEADER + count
        places = positions([*heard, Piece([0] * (HEADER + count))])
        codes = np.full((total, len(self.quiet)), -1)
        codes[users + HEADER :] = frames
        following = np.full_like(codes, -1)
        following[users + HEADER - 1 : total - 1] = frames
        label = np.full(total, -100)
        label[users + HEADER - 1 : total - 1] = frames[:, 0]
        label[total - 1] = talker["codec_eos_token_id"]
        weight = np.zeros(total, np.float32)
        weight[users + HEADER - 1 :] = [*weights, 1.0]
        return {
            "text": np.array(text), "codec": np.array(codec + [-1] * count), "positions": places, "codes": codes,
            "media": np.array(media + [-1] * (total - users)), "next": following, "label": label,
            "weight": weight,
        }  # fmt: skip
