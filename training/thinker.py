"""Stage: the thinker with its towers, end to end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.conversations import TEXT_TOKENS
from training.data import Data
from training.pictures import draw, patches
from training.sounds import HEARING, HOP, MOST_FRAMES, bank, log_mel, mel_filters, vary
from training.steps import Step, rate_of, variation
from training.teacher import Album, Teacher
from training.towers import Sight, hear, tower_of

BALANCE = 0.01
"""Weight of the routers' balance."""
TEXT_WEIGHT = 0.5
"""Weight of plain text beside the tasks, as long as it has been read `PASSES` times; from then on it falls."""
PASSES = 10
MEDIA_WEIGHT = 0.3
"""Weight of the digit read from a tower's features alone: most pictures and recordings of a batch are in no row."""
WRONG = 0.2
"""Share of the tokens read of plain text that are others: the text is short, and is read often."""
WHOLE = 6.0
"""So many tokens of an answer count in full; a longer answer counts as much as these."""


class Senses:
    """Media of a batch to tower features, everything on the device.

    Args:
        thinker: the stock thinker.
        data: pictures and recordings.
    """

    def __init__(self, thinker: Any, data: Data) -> None:
        self.thinker = thinker
        device = thinker.device
        self.sight = Sight(tower_of(thinker, "visual"))
        self.digits = torch.from_numpy(data.pictures).to(device)
        self.waves, _ = bank(data, HEARING, device)
        self.filters = mel_filters().to(device)

    def see(self, batch: dict[str, Tensor], random: torch.Generator | None) -> tuple[Tensor, list[Tensor], Tensor]:
        ink = batch["picture_ink"] if "picture_ink" in batch else self.digits[batch["picture_number"]]
        pictures = draw(
            ink,
            batch["picture_rows"],
            batch["picture_columns"],
            random is not None,
            random,
        )
        return self.sight(patches(pictures), batch["picture_rows"], batch["picture_columns"])

    def hear(self, batch: dict[str, Tensor], random: torch.Generator | None) -> tuple[Tensor, Tensor]:
        waves, frames = self.waves[batch["sound_number"]], batch["sound_frames"]
        if random is None:
            waves = F.pad(waves, (0, MOST_FRAMES * HOP - waves.shape[1]))
        else:
            waves = vary(waves, batch["sound_speed"], batch["sound_start"], frames * HOP, random)
        return hear(tower_of(self.thinker, "audio_tower"), log_mel(waves, frames, self.filters, random), frames)


def embed(
    thinker: Any, senses: Senses, batch: dict[str, Tensor], random: torch.Generator | None
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Tokens and media to the decoder's input.

    Returns:
        Embeddings ``(rows, tokens, hidden)``, what the deepstack adds, pooled features of the media.
    """
    states = thinker.get_input_embeddings()(batch["ids"])
    rows, tokens, width = states.shape
    # One more token, which nothing reads: there goes what no row shows.
    flat = F.pad(states.reshape(-1, width), (0, 0, 0, 1))
    deep: list[Tensor] = []
    pooled: dict[str, Tensor] = {}
    if len(batch["sound_number"]):
        features, valid = senses.hear(batch, random)
        flat = flat.index_copy(0, batch["sound_to"], features.reshape(-1, width).to(flat.dtype))
        pooled["sound"] = (features * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
    if len(batch["picture_number"]):
        features, levels, valid = senses.see(batch, random)
        flat = flat.index_copy(0, batch["picture_to"], features.reshape(-1, width).to(flat.dtype))
        pooled["picture"] = (features * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        for one in levels:
            level = torch.zeros_like(flat).index_copy(0, batch["picture_to"], one.reshape(-1, width).to(flat.dtype))
            deep.append(level[:-1].view(rows, tokens, width))
    return flat[:-1].view(rows, tokens, width), deep, pooled


def decode(
    decoder: Any, states: Tensor, places: Tensor, deep: Sequence[Tensor] = (), layers: int | None = None
) -> Tensor:
    """The stock text decoder on rows of one length, without anything that waits for the device.

    Args:
        decoder: ``Qwen3OmniMoeThinkerTextModel`` or the talker's.
        states: ``(rows, tokens, hidden)``.
        places: of every token, ``(3, rows, tokens)``.
        deep: what the deepstack adds behind the first layers, each as `states`, zero where there is no picture.
        layers: stop behind so many, without the last norm.

    Returns:
        As `states`.
    """
    rotary = decoder.rotary_emb(states, places)
    for number, layer in enumerate(decoder.layers):
        states = layer(states, attention_mask=None, position_embeddings=rotary)
        if number + 1 == layers:
            return states
        if number < len(deep):
            states = states + deep[number]
    return decoder.norm(states)


def read(
    thinker: Any, senses: Senses, batch: dict[str, Tensor], random: torch.Generator | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states after the last norm, ``(rows, tokens, hidden)``, and pooled features.

    Rows are padded on the right under a causal mask, so no token sees padding.
    """
    states, deep, pooled = embed(thinker, senses, batch, random)
    return decode(thinker.get_decoder(), states, batch["positions"], deep), pooled


class Routers:
    """Collects router logits, for the loss that keeps every expert in use."""

    def __init__(self, decoder: Any, chosen: int) -> None:
        self.chosen, self.logits = chosen, []
        self.hooks = [
            module.register_forward_hook(lambda _, __, output: self.logits.append(output[0]))
            for name, module in decoder.named_modules()
            if name.endswith("mlp.gate")
        ]

    def loss(self) -> Tensor:
        """1 where the experts are used evenly, up to their number where one gets all."""
        total: Any = 0.0
        for logits in self.logits:
            shares = logits.float().softmax(-1)
            used = torch.zeros_like(shares).scatter(1, shares.topk(self.chosen).indices, 1.0).mean(0) / self.chosen
            total = total + shares.shape[1] * (used * shares.mean(0)).sum()
        count = len(self.logits)
        self.logits.clear()
        return total / count


def to_device(batch: dict[str, Tensor], device: Any) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def autocast(device: Any) -> Any:
    """BF16 arithmetic over float32 weights on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Heads(nn.Module):
    """Helps the towers in the beginning: the digit from pooled features. Not part of the model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.picture, self.sound = nn.Linear(width, 10), nn.Linear(width, 10)


def text_weight(rows: int, steps: int, tokens: int) -> Tensor:
    """Weight of plain text, a scalar.

    A fast machine reads the text more often in the same time, and would learn it by heart.

    Args:
        rows: of plain text in a batch.
        steps: taken.
        tokens: of all the text.
    """
    passes = rows * TEXT_TOKENS * steps / tokens
    return torch.tensor(TEXT_WEIGHT * min(1.0, PASSES / max(passes, 1.0)) ** 2)


def slipped(ids: Tensor, words: int, random: torch.Generator) -> Tensor:
    """Token ids of which a share of `WRONG` are others, drawn below `words`."""
    others = torch.randint(words, ids.shape, generator=random, device=ids.device)
    return torch.where(torch.rand(ids.shape, generator=random, device=ids.device) < WRONG, others, ids)


def train(model: Any, data: Data, batches: Any, clock_of: Any, seed: int, capture: bool = False) -> None:
    """Trains the thinker.

    Args:
        model: the whole model; only its thinker changes.
        data: for media and their digits.
        batches: endless batches of conversations, all of the same shapes if `capture`.
        clock_of: a function from ``(optimizer, modules)`` to a `Clock`.
        seed: of the variation of media.
        capture: as for `training.steps.Step`.
    """
    from training.architecture import groups

    thinker = model.thinker
    device = thinker.device
    senses = Senses(thinker, data)
    heads = Heads(thinker.config.text_config.hidden_size).to(device)
    everything = nn.ModuleDict({"thinker": thinker, "heads": heads})
    cuda = device.type == "cuda"
    words = int(data.text.max()) + 1
    optimizer = torch.optim.AdamW(
        groups(everything, 0.05), lr=rate_of(device, 1e-3), betas=(0.9, 0.98), fused=cuda, capturable=cuda
    )
    random = variation(device, seed)
    routers = Routers(thinker.get_decoder(), thinker.config.text_config.num_experts_per_tok)
    spoken = F.one_hot(torch.from_numpy(data.wave_digits), 10).float().to(device)
    album, teacher = Album(data, device), Teacher(data, device)
    clock = clock_of(optimizer, {"thinker": thinker, "heads": heads})
    thinker.train()

    def learn(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        # A picture that a row shows keeps its digit; the others may lie between two.
        free = batch["picture_to"].view(len(batch["picture_number"]), -1)[:, 0] == batch["ids"].numel()
        ink = album.between(album.places[batch["picture_number"]], free, random)
        wanted = {"picture": teacher(ink), "sound": spoken[batch["sound_number"]]}
        ids = torch.where(batch["plain"][:, None], slipped(batch["ids"], words, random), batch["ids"])
        with autocast(device):
            states, pooled = read(thinker, senses, batch | {"picture_ink": ink, "ids": ids}, random)
            logits = thinker.lm_head(states[:, :-1])
        labels = batch["labels"][:, 1:]
        learned = labels != -100
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        # A continuation's many tokens must not outweigh the one token that names a digit.
        weight = (WHOLE / learned.sum(1, keepdim=True).clamp(min=1)).clamp(max=1.0) * learned
        plain = batch["plain"][:, None]
        task = (losses * weight * ~plain).sum() / (weight * ~plain).sum()
        text = (losses * plain).sum() / (learned & plain).sum().clamp(min=1)
        balance = routers.loss()
        media = {kind: F.cross_entropy(getattr(heads, kind)(one.float()), wanted[kind]) for kind, one in pooled.items()}
        helped: Any = sum(media.values())
        loss = task + batch["text_weight"] * text + BALANCE * balance + MEDIA_WEIGHT * helped
        loss.backward()
        nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
        optimizer.step()
        return {"task": task, "text": text, "balance": balance, **media}

    step = Step(learn, device, capture)
    for number in clock:
        batch = next(batches)
        weight = text_weight(int(batch["plain"].sum()), number, len(data.text))
        values = step(batch | {"text_weight": weight})
        if clock.tell:
            clock.say(values)
    for hook in routers.hooks:
        hook.remove()
    thinker.eval()
    clock.done()


@torch.no_grad()
def examine(model: Any, data: Data, author: Any, examples: int, per_batch: int = 256) -> dict[str, float]:
    """Accuracy by task on what was held out, and perplexity of held-out text.

    Args:
        model: the whole model.
        data: for media.
        author: an `Author` with ``test=True``.
        examples: the most of each kind.
        per_batch: rows at once.

    Returns:
        For each task the share of answers of which every token, end marker included, is the likeliest; for ``text`` the
        perplexity per token.
    """
    from training.batches import batch
    from training.conversations import Row

    thinker = model.thinker
    senses = Senses(thinker, data)
    right: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    rows = all_rows(author, examples)
    for first in range(0, len(rows), per_batch):
        some = rows[first : first + per_batch]
        tensors = to_device(
            batch(some, author.end, model.config.thinker_config.text_config.vocab_size - 1), thinker.device
        )
        with autocast(thinker.device):
            states, _ = read(thinker, senses, tensors, None)
            guess = thinker.lm_head(states[:, :-1]).argmax(-1)
        labels = tensors["labels"][:, 1:]
        good = ((guess == labels) | (labels == -100)).all(1).tolist()
        for row, one in zip(some, good, strict=True):
            tried[row.task] += 1
            right[row.task] += one
    result = {task: right[task] / count for task, count in sorted(tried.items())}
    text = data.test_text.astype("int64")
    pieces = [text[place : place + TEXT_TOKENS].tolist() for place in range(0, len(text) - TEXT_TOKENS, TEXT_TOKENS)]
    total, count = 0.0, 0
    pieces = pieces[: 10 * examples]
    for first in range(0, len(pieces), per_batch):
        tensors = to_device(
            batch([Row([], piece, plain=True) for piece in pieces[first : first + per_batch]], author.end, 0),
            thinker.device,
        )
        with autocast(thinker.device):
            states, _ = read(thinker, senses, tensors, None)
            logits = thinker.lm_head(states[:, :-1])
        losses = F.cross_entropy(logits.float().flatten(0, 1), tensors["labels"][:, 1:].flatten(), reduction="sum")
        total, count = total + float(losses), count + tensors["labels"][:, 1:].numel()
    result["perplexity per token"] = math.exp(total / count)
    return result


def all_rows(author: Any, examples: int) -> list[Any]:
    """Held-out pictures and recordings, each once, and conversations of the other tasks; of each at most so many."""
    from training.conversations import Piece, Row
    from training.phrases import PICTURE, SOUND

    rows = []
    for kind, numbers in (("picture", author.pictures), ("sound", author.sounds)):
        for number in numbers[:examples]:
            media, digit = author.picture(number) if kind == "picture" else author.sound(number)
            asked = author.say((PICTURE if kind == "picture" else SOUND)[0])
            header = Piece([author.start, *author.encode("user\n")])
            close = Piece([author.end, *author.encode("\n"), author.start, *author.encode("assistant\n")])
            rows.append(Row([header, *media, asked, close], author.number(digit)[0], task=kind))
    return rows + [author.conversation(task) for task in ("two", "arithmetic", "repeat") for _ in range(examples)]
