"""What the talker says, made as it is used, and whether the judge hears it right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.data import VOICES, Data
from training.script import Script
from training.talker import frame_states, inputs, predictor_logits
from training.thinker import Senses, autocast, decode, to_device


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
    from training.batches import batch
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
