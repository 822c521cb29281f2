"""What training computes in batches is what processor, chat template and stock modules give."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")


def stock_inputs(row: Any, data: Any, tokenizer: Any, processor: Any, senses: Any, answered: bool = True) -> Any:
    """The processor's inputs for a conversation."""
    from PIL import Image

    text = tokenizer.decode([token for piece in row.pieces for token in piece.ids])
    for pad in ("<|image_pad|>", "<|audio_pad|>"):
        text = re.sub(f"({re.escape(pad)})+", pad, text)
    if answered:
        text += tokenizer.decode(row.answer) + "<|im_end|>"
    media: dict[str, list[Any]] = {"images": [], "audio": []}
    for piece in row.pieces:
        if piece.kind == "picture":
            grey = (np.kron(data.pictures[piece.medium.number], np.ones((8, 8))) * 255).round().astype(np.uint8)
            media["images"].append(Image.fromarray(grey).convert("RGB"))
        if piece.kind == "sound":
            samples = 2 * len(data.recording(piece.medium.number)[:10400])
            media["audio"].append(senses.waves[piece.medium.number][:samples].numpy())
    return processor(text=text, return_tensors="pt", **{kind: one for kind, one in media.items() if one})


@pytest.fixture(scope="module")
def senses(model: Any, data: Any) -> Any:
    from training.thinker import Senses

    return Senses(model.thinker, data)


@pytest.mark.parametrize("task", ["picture", "sound", "two", "two", "arithmetic", "repeat"])
def test_ids_positions_and_logits_are_the_stock_ones(
    task: str, model: Any, data: Any, config: Any, tokenizer: Any, processor: Any, senses: Any
) -> None:
    from training.batches import batch
    from training.conversations import Author

    from training import thinker

    author = Author(data, tokenizer, config, test=True, seed=3)
    row = author.conversation(task)
    tensors = batch([row], author.end, 0)
    stock = stock_inputs(row, data, tokenizer, processor, senses)
    count = stock["input_ids"].shape[1]
    assert tensors["ids"][0, :count].tolist() == stock["input_ids"][0].tolist()
    heard = stock.get("feature_attention_mask")
    places, _ = model.thinker.get_rope_index(
        stock["input_ids"], image_grid_thw=stock.get("image_grid_thw"), attention_mask=stock["attention_mask"],
        audio_seqlens=None if heard is None else heard.sum(-1),
    )  # fmt: skip
    assert torch.equal(places[:, 0].long(), tensors["positions"][:, 0, :count])
    with torch.no_grad():
        states, _ = thinker.read(model.thinker, senses, tensors, None)
        ours = model.thinker.lm_head(states)[0, :count]
        theirs = model.thinker(**stock).logits[0]
    # Float32 on both sides; the features of sound are computed by two programs.
    assert float((ours - theirs).abs().max()) < 1e-3 * float(theirs.std())


def test_the_talker_says_what_the_stock_talker_says(
    model: Any,
    data: Any,
    config: Any,
    tokenizer: Any,
    processor: Any,
    senses: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from training.batches import batch
    from training.conversations import Author

    from training import script as scripts
    from training import speech

    monkeypatch.setattr(scripts, "MOST_SECONDS", 2.0)
    author = Author(data, tokenizer, config, test=True, seed=4)
    codes = {int(number): np.zeros((3, 6), np.uint16) for number in data.wave_numbers(False)}
    script = scripts.Script(data, codes, dict.fromkeys(codes, 0.0), np.zeros(6, np.uint16), config, 0)
    row = author.conversation("sound")
    inputs = stock_inputs(row, data, tokenizer, processor, senses, answered=False)
    # Transformers 5.17 to 5.23 read a thinker setting from the talker's config when speech follows an audio input.
    model.talker.config.audio_config = model.thinker.config.audio_config
    said: list[Any] = []
    hook = model.talker.register_forward_hook(lambda _, __, output: said.append(output.hidden_states[1]))
    try:
        tokens, _ = model.generate(
            **inputs, return_audio=True, speaker="Chelsie", thinker_max_new_tokens=3, thinker_do_sample=False,
            talker_max_new_tokens=5, talker_do_sample=False,
        )  # fmt: skip
    finally:
        hook.remove()
    stock = torch.cat([one for one in said if one is not None])
    row.answer = tokens[0, inputs["input_ids"].shape[1] :].tolist()[:-1]
    tensors = batch([row], author.end, 0)
    tensors |= script.batch([row], tensors["ids"].shape[1], ["chelsie"], empty=True)
    ours = speech.say(model, data, tensors, [row.answer], len(stock), None)[0]
    assert ours[: len(stock)].tolist() == stock.tolist()


def test_the_codecs_vocoder_is_the_stock_one(model: Any) -> None:
    from training import codec

    vocoder = model.code2wav
    codes = torch.randint(256, (2, 6, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = vocoder(codes)[:, 0]
        ours = codec.speak(vocoder, vocoder.code_embedding(codes + vocoder.code_offset).mean(1)).clamp(-1, 1)
    assert float((ours - theirs).abs().max()) < 1e-5 + 1e-3 * float(theirs.std())


@pytest.mark.parametrize("side", [4, 8])
def test_the_eye_asks_as_the_thinker_is_asked(side: int, model: Any, data: Any, config: Any, tokenizer: Any) -> None:
    """`eye.answer` gives what `thinker.read` gives for the same question about the same picture."""
    from training.batches import batch
    from training.conversations import Author, Piece, Row
    from training.pictures import draw
    from training.towers import Sight, tower_of

    from training import eye, thinker

    author, again = (Author(data, tokenizer, config, test=False, seed=5) for _ in range(2))
    numbers = torch.tensor([3, 8])
    size = torch.full((2,), side)
    pictures = draw(torch.from_numpy(data.pictures)[numbers], size, size, False, None, 16 * side)
    flat, _, first = eye.asked(again, side)
    count = side * side // 4
    with torch.no_grad():
        ours = eye.answer(model.thinker, Sight(tower_of(model.thinker, "visual"), side), pictures, author, side)
        rows = []
        for number in numbers.tolist():
            medium = author.picture(number, (side, side))[0][1]
            rows.append(Row([Piece(flat[:first]), medium, Piece(flat[first + count :])], [0]))
        tensors = batch(rows, author.end, 0)
        states, _ = thinker.read(model.thinker, thinker.Senses(model.thinker, data), tensors, None)
        theirs = model.thinker.lm_head(states[:, len(flat) - 1])
    assert float((ours - theirs).abs().max()) < 1e-3 * float(theirs.std())
