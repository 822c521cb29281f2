"""Stage: the talker and its code predictor, on the codec's codes, behind a thinker that stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import Data
from training.steps import Step, rate_of, variation
from training.thinker import BALANCE, Routers, Senses, autocast, decode, embed

SLIPS = 0.1
"""Share of the codes read in training that are wrong: what the talker says itself is not always what it learned."""
RESIDUAL_WEIGHT = 2.0
"""Weight of the residual codes' mean beside the first code: there are five of them, and they decide which recording."""


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
