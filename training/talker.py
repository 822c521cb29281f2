"""Stage: the talker and its code predictor, on the codec's codes, behind a thinker that stays as it is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.conversations import Piece, Row, positions
from training.data import VOICES, Data
from training.steps import Step, rate_of, variation
from training.thinker import BALANCE, Routers, Senses, autocast, decode, embed, to_device

MOST_SECONDS = 0.85
"""Longer recordings are no targets: they hold hesitation."""
HEADER = 9
"""Positions between the user's part and the first frame."""
TAKES = 12
"""Recordings of each digit that a voice learns from: those in which the ear hears it best through the codec."""
SLIPS = 0.1
"""Share of the codes read in training that are wrong: what the talker says itself is not always what it learned."""
RESIDUAL_WEIGHT = 2.0
"""Weight of the residual codes' mean beside the first code: there are five of them, and they decide which recording."""
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

    def seeded(self, seed: int) -> None:
        self.random = random.Random(seed)

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


def frame_states(talker: Any, codes: Tensor) -> Tensor:
    """Sum of the embeddings of one frame's codes; ``(…, groups)`` to ``(…, hidden)``."""
    states = talker.get_input_embeddings()(codes[..., 0])
    for group, table in enumerate(talker.code_predictor.get_input_embeddings(), start=1):
        states = states + table(codes[..., group])
    return states


def inputs(model: Any, batch: dict[str, Tensor], senses: Senses, variation: Any) -> Tensor:
    """The talker's input, ``(rows, tokens, hidden)``: text, media as the thinker hears and sees them, codes so far.

    With a `variation` media are varied and some codes are wrong.
    """
    with torch.no_grad():
        hidden = accepted(model, batch, senses, variation)
        words = model.thinker.get_input_embeddings()(batch["talk_text"])
    talker = model.talker
    states = talker.text_projection(words)
    media = batch["talk_media"]
    seen = talker.hidden_projection(hidden.reshape(-1, hidden.shape[-1])[media.clamp(min=0)].to(words.dtype))
    states = torch.where((media >= 0)[..., None], seen.to(states.dtype), states)
    special = talker.get_input_embeddings()(batch["talk_codec"].clamp(min=0))
    states = states + special * (batch["talk_codec"] >= 0)[..., None]
    codes = batch["talk_codes"]
    if variation is not None:
        size = model.config.code2wav_config.codebook_size
        wrong = torch.randint(size, codes.shape, generator=variation, device=codes.device)
        slips = torch.rand(codes.shape, generator=variation, device=codes.device) < SLIPS
        codes = torch.where(slips & (codes >= 0), wrong, codes)
    return states + frame_states(talker, codes.clamp(min=0)) * (codes[..., :1] >= 0)


def accepted(model: Any, batch: dict[str, Tensor], senses: Senses, variation: Any) -> Tensor:
    """What the thinker's layer says that the talker listens to."""
    states, deep, _ = embed(model.thinker, senses, batch, variation)
    layers = model.config.talker_config.accept_hidden_layer
    return decode(model.thinker.get_decoder(), states, batch["positions"], deep, layers)


def predictor_logits(talker: Any, states: Tensor, codes: Tensor) -> Tensor:
    """Logits of the residual codes.

    Args:
        talker: the stock talker.
        states: its output where each frame is due, ``(frames, hidden)``.
        codes: of each frame; all groups but the last are read, ``(frames, groups or fewer)``.

    Returns:
        ``(frames, groups read, codes)``: for the group after each one read.
    """
    predictor = talker.code_predictor
    parts = [states, talker.get_input_embeddings()(codes[:, 0]).to(states.dtype)]
    tables = predictor.get_input_embeddings()
    for group in range(1, codes.shape[1]):
        parts.append(tables[group - 1](codes[:, group]).to(states.dtype))
    output = torch.stack(parts, dim=1)
    # As the stock model, but its mask would wait for the device.
    rotary = predictor.model.rotary_emb(output, torch.arange(output.shape[1], device=output.device)[None])
    for layer in predictor.model.layers:
        output = layer(output, attention_mask=None, position_embeddings=rotary)
    output = predictor.model.norm(output)
    return torch.stack([predictor.lm_head[group](output[:, group + 1]) for group in range(codes.shape[1])], dim=1)


def train(model: Any, data: Data, batches: Any, clock_of: Any, seed: int, capture: bool = False) -> None:
    """Trains talker and code predictor; arguments as in `training.thinker.train`, batches with a `Script`."""
    from training.architecture import groups

    talker = model.talker
    device = talker.device
    senses = Senses(model.thinker, data)
    model.thinker.requires_grad_(False)
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        groups(talker, 0.05), lr=rate_of(device, 1e-3), betas=(0.9, 0.98), fused=cuda, capturable=cuda
    )
    random = variation(device, seed)
    routers = Routers(talker.model, talker.config.text_config.num_experts_per_tok)
    clock = clock_of(optimizer, {"talker": talker})
    talker.train()

    def learn(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        codes, weight = batch["talk_next"], batch["talk_due_weight"]
        with autocast(device):
            states = inputs(model, batch, senses, random)
            output = decode(talker.model, states, batch["talk_positions"])
            logits = talker.codec_head(output)
            rest = predictor_logits(talker, output.flatten(0, 1)[batch["talk_due"]], codes[:, :-1])
        losses = F.cross_entropy(logits.float().flatten(0, 1), batch["talk_label"].flatten(), reduction="none")
        first_weight = batch["talk_weight"].flatten()
        first = (losses * first_weight).sum() / first_weight.sum()
        losses = F.cross_entropy(rest.float().flatten(0, 1), codes[:, 1:].flatten(), reduction="none")
        residual = (losses.view(len(codes), -1).mean(1) * weight).sum() / weight.sum()
        balance = routers.loss()
        loss = first + RESIDUAL_WEIGHT * residual + BALANCE * balance
        loss.backward()
        nn.utils.clip_grad_norm_(talker.parameters(), 1.0)
        optimizer.step()
        return {"first codes": first, "residual codes": residual, "balance": balance}

    step = Step(learn, device, capture)
    for _ in clock:
        values = step(next(batches))
        if clock.tell:
            clock.say(values)
    for hook in routers.hooks:
        hook.remove()
    talker.eval()
    clock.done()


def draw(logits: Tensor, random: Any, *, top_k: int = 50, top_p: float = 1.0, temperature: float = 1.0) -> Tensor:
    """One code of each row; `random` None takes the likeliest."""
    if random is None:
        return logits.argmax(-1)
    values, order = (logits / temperature).topk(min(top_k, logits.shape[-1]), dim=-1)
    shares = values.softmax(-1)
    # The likeliest codes that together reach top_p.
    shares = shares * (shares.cumsum(-1) - shares < top_p)
    return order.gather(-1, torch.multinomial(shares, 1, generator=random))[..., 0]


@torch.no_grad()
def say(
    model: Any, data: Data, batch: dict[str, Tensor], answers: Sequence[Sequence[int]], most: int, random: Any
) -> list[Tensor]:
    """Generates codes for many rows at once, without a cache: for examination, not for use.

    Args:
        model: the whole model.
        data: for media.
        batch: of rows with an empty `Script.batch`, on the device.
        answers: token ids of each row's text.
        most: frames.
        random: as in `draw`.

    Returns:
        For each row its codes, ``(frames, groups)``.
    """
    talker, config = model.talker, model.config
    device = talker.device
    vocabulary = config.talker_config.text_config.vocab_size
    codes_end, eos = vocabulary - 1024, config.talker_config.codec_eos_token_id
    trailing = [[*one[1:], config.tts_eos_token_id] for one in answers]
    words = torch.full((len(answers), most), config.tts_pad_token_id)
    for row, one in enumerate(trailing):
        words[row, : min(most, len(one))] = torch.tensor(one[:most])
    count = len(answers)
    with autocast(device):
        texts = talker.text_projection(model.thinker.get_input_embeddings()(words.to(device)))
        prompt = inputs(model, batch, Senses(model.thinker, data), None)
        length = batch["talk_length"]
        space = torch.zeros(count, most, prompt.shape[-1], dtype=prompt.dtype, device=device)
        states = torch.cat([prompt, space], dim=1)
        last = batch["talk_positions"][0].gather(1, length[:, None] - 1)
        place = torch.arange(states.shape[1], device=device)[None]
        later = last + place - (length[:, None] - 1)
        pad = F.pad(batch["talk_positions"], (0, most))
        spots = torch.where((place >= length[:, None])[None], later[None], pad)
        rows = torch.arange(count, device=device)
        made: list[Tensor] = []
        ended = torch.full((count,), most, device=device)
        banned = torch.ones(vocabulary, dtype=torch.bool, device=device)
        banned[:codes_end] = False
        banned[eos] = False
        seen = torch.zeros(count, vocabulary, dtype=torch.bool, device=device)
        for frame in range(most):
            now = int(length.max()) + frame
            output = decode(talker.model, states[:, :now], spots[:, :, :now])[rows, length - 1 + frame]
            logits = talker.codec_head(output).float()
            logits = torch.where(seen, torch.where(logits > 0, logits / 1.05, logits * 1.05), logits)
            first = draw(logits.masked_fill(banned, -torch.inf), random, temperature=0.9)
            seen[rows, first] = True
            ended = torch.where((first == eos) & (ended == most), frame, ended)
            if bool((ended < most).all()):
                break
            first = first.clamp(max=codes_end - 1)
            codes = first[:, None]
            for _ in range(model.config.talker_config.num_code_groups - 1):
                rest = predictor_logits(talker, output, codes)[:, -1].float()
                codes = torch.cat([codes, draw(rest, random, top_p=0.8)[:, None]], dim=1)
            made.append(codes)
            states[rows, length + frame] = (frame_states(talker, codes) + texts[:, frame]).to(states.dtype)
    together = torch.stack(made, dim=1) if made else torch.zeros(count, 0, 0, dtype=torch.long, device=device)
    return [one[: int(end)] for one, end in zip(together, ended, strict=True)]


@torch.no_grad()
def examine(
    model: Any, judge: Any, data: Data, author: Any, script: Script, takes: int, random: Any
) -> dict[str, float]:
    """Whether a digit that the model says is heard by the judge.

    Args:
        model: the whole model.
        judge: `training.judge.Judge`.
        data: for media.
        author: of held-out conversations.
        script: for the talker's input.
        takes: how often each voice says each digit.
        random: as in `draw`.

    Returns:
        The share heard right in all, and for each voice.
    """
    rows, voices = [], []
    for voice in VOICES:
        for digit in range(10):
            found = 0
            while found < takes:
                row = author.conversation(author.random.choice(("picture", "sound")))
                if row.spoken == (digit,):
                    rows.append(row)
                    voices.append(voice)
                    found += 1
    heard = spoken(model, judge, data, author, script, rows, voices, random)
    right = torch.tensor([digit == row.spoken[0] for digit, row in zip(heard, rows, strict=True)]).float()
    result = {"spoken": float(right.mean())}
    for voice in VOICES:
        result[f"spoken by {voice}"] = float(right[[one == voice for one in voices]].mean())
    return result


@torch.no_grad()
def spoken(
    model: Any, judge: Any, data: Data, author: Any, script: Script, rows: Any, voices: Any, random: Any
) -> list[int]:
    """What the judge hears when the model says each row's answer; -1 where it says nothing."""
    from training.conversations import batch
    from training.judge import heard, lowered

    device = model.device
    pad = model.config.thinker_config.text_config.vocab_size - 1
    tensors = batch(rows, author.end, pad)
    tensors |= script.batch(rows, tensors["ids"].shape[1], voices, empty=True)
    made = say(model, data, to_device(tensors, device), [row.answer for row in rows], 24, random)
    result = []
    for codes in made:
        if not len(codes):
            result.append(-1)
            continue
        wave = model.code2wav(codes.T[None])[0]
        wave = F.pad(wave.float(), (0, -wave.shape[-1] % 3))
        low = lowered(wave)
        result.append(int(heard(judge, low, torch.tensor([low.shape[-1]], device=device))[0]))
    return result
