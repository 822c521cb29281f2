"""The tiny checkpoint in Transformers: loads without complaint, hears, sees, writes, speaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

SECOND = 16_000
"""Samples in a second of audio input."""


@pytest.fixture(scope="module")
def image() -> Any:
    pytest.importorskip("PIL", reason="pillow is not installed")
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def audio() -> NDArray[np.float32]:
    wave: NDArray[np.float32] = np.sin(np.arange(SECOND) * 0.05).astype(np.float32)
    return wave


@pytest.fixture(scope="module")
def inputs(processor: Any, image: Any, audio: NDArray[np.float32]) -> Any:
    conversation = [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": image},
                {"type": "audio", "audio": audio},
                {"type": "text", "text": "What do you see and hear?"},
            ],
        },
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    return processor(text=text, images=[image], audio=[audio], return_tensors="pt")


def test_every_key_is_used_and_none_is_made_up(loaded: tuple[Any, dict[str, Any]]) -> None:
    told = loaded[1]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not told[kind], kind


def test_loaded_values_are_the_files(model: Any, tiny_folder: Path) -> None:
    import torch
    from tiny_reading import read_bits

    bits = read_bits(tiny_folder)
    # Where the decoder hangs differs between Transformers versions; names on disk do not.
    (experts,) = (module for name, module in model.thinker.named_modules() if name.endswith("layers.1.mlp.experts"))
    gate = bits["thinker.model.layers.1.mlp.experts.5.gate_proj.weight"]
    down = bits["thinker.model.layers.1.mlp.experts.5.down_proj.weight"]
    assert (experts.gate_up_proj[5, : gate.shape[0]].view(torch.uint16).numpy() == gate).all()
    assert (experts.down_proj[5].view(torch.uint16).numpy() == down).all()


def test_thinker_reads_text_image_and_audio(model: Any, processor: Any, inputs: Any) -> None:
    import torch

    ids = inputs["input_ids"]
    config = model.config.thinker_config
    # 64 x 96 pixels in patches of 16, merged 2 x 2; 100 frames of 10 ms, 13 tokens a second.
    assert (ids == config.image_token_id).sum() == 6
    assert (ids == config.audio_token_id).sum() == 13
    with torch.no_grad():
        logits = model.thinker(**inputs).logits
        deaf = model.thinker(input_ids=ids, attention_mask=inputs["attention_mask"]).logits
    assert logits.shape == (*ids.shape, config.text_config.vocab_size)
    assert logits.isfinite().all()
    assert logits[0, -1].std() > 1, "peaked enough for a comparison of distributions to mean something"
    assert (logits[0, -1] - deaf[0, -1]).abs().max() > 0.1, "image and audio reach the answer"


def test_every_expert_is_used(model: Any, processor: Any) -> None:
    import torch

    text = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 8
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    counts: dict[str, list[int]] = {}
    text_config = model.config.thinker_config.text_config

    def count(name: str, router: Any, states: Any) -> None:
        logits = states.reshape(-1, text_config.hidden_size) @ router.weight.T
        chosen = logits.topk(text_config.num_experts_per_tok).indices.flatten()
        counts[name] = torch.bincount(chosen, minlength=text_config.num_experts).tolist()

    # Hooks, because not every Transformers version hands router logits out.
    routers = [(name, module) for name, module in model.thinker.named_modules() if name.endswith("mlp.gate")]
    hooks = [
        router.register_forward_hook(lambda module, inputs, _, name=name: count(name, module, inputs[0]))
        for name, router in routers
    ]
    try:
        with torch.no_grad():
            model.thinker(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(counts) == text_config.num_hidden_layers
    assert all(min(per_expert) > 0 for per_expert in counts.values()), counts


def test_it_writes_and_speaks(model: Any, inputs: Any) -> None:
    import torch

    torch.manual_seed(0)
    frames = 12
    sequences, waveform = model.generate(
        **inputs,
        return_audio=True,
        speaker="Ethan",
        thinker_max_new_tokens=6,
        thinker_do_sample=False,
        thinker_eos_token_id=model.config.im_end_token_id,
        talker_max_new_tokens=frames,
    )
    assert sequences.shape[1] > inputs["input_ids"].shape[1]
    assert waveform.dtype == torch.float32
    assert waveform.shape[:2] == (1, 1)
    # 1,920 samples of 24 kHz a frame, less what the causal transposed convolutions cut off at the end.
    assert (frames - 2) * 1920 < waveform.shape[-1] <= frames * 1920
    assert waveform.isfinite().all()
    assert 0.02 < waveform.std() < 0.5
    assert (waveform.abs() >= 1).float().mean() < 0.01, "clipped"


@pytest.mark.parametrize("speaker", ["Ethan", "Chelsie", "Aiden"])
def test_speakers_are_known(model: Any, speaker: str) -> None:
    assert speaker.lower() in model.config.talker_config.speaker_id


def test_text_round_trip(processor: Any) -> None:
    tokenizer = processor.tokenizer
    text = "Grüße, 世界! <|im_start|>user\nIt's 3 o'clock.\n\n  fn(x) -> 7<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer(text.encode().decode())["input_ids"] == ids
    assert len(tokenizer("the quick thoughts of man")["input_ids"]) < 10, "words, not bytes"


def test_roles_and_markers_are_single_tokens(processor: Any, model: Any) -> None:
    def ids_of(text: str) -> list[int]:
        ids: list[int] = processor.tokenizer(text)["input_ids"]
        return ids

    config = model.config
    for role in ("system", "user", "assistant"):
        ids = ids_of(f"<|im_start|>{role}\n")
        assert ids[:2] == [config.im_start_token_id, getattr(config, f"{role}_token_id")]
        assert len(ids) == 3
    assert processor.tokenizer.eos_token_id == config.im_end_token_id
    assert ids_of(processor.tokenizer.audio_token) == [config.thinker_config.audio_token_id]
    assert ids_of(processor.tokenizer.image_token) == [config.thinker_config.image_token_id]
    assert ids_of(processor.tokenizer.video_token) == [config.thinker_config.video_token_id]


def test_chat_template(processor: Any) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "video", "video": "a.mp4"},
                {"type": "text", "text": "What"},
                {"type": "image", "image": "b.png"},
                {"type": "audio", "audio": "c.wav"},
                {"type": "text", "text": " is it?"},
            ],
        },
        {"role": "assistant", "content": "A bird."},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What<|vision_start|><|image_pad|><|vision_end|>"
        "<|audio_start|><|audio_pad|><|audio_end|> is it?<|im_end|>\n"
        "<|im_start|>assistant\nA bird.<|im_end|>\n"
    )
    assert processor.apply_chat_template(conversation, tokenize=False) == expected
    prompted = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert prompted == expected + "<|im_start|>assistant\n"
    assert processor.tokenizer.apply_chat_template(conversation, tokenize=False) == expected


def test_video_in_one_conversation(processor: Any, model: Any) -> None:
    import torch

    video = np.random.default_rng(1).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "video": "v"}, {"type": "text", "text": "What moves?"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    # The processor itself scales a video to at least 128 x 32 x 32 pixels, which is slow and of no use here.
    size = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64 * 4}
    batch = processor(
        text=text, videos=[video], videos_kwargs={"do_sample_frames": False, "size": size}, return_tensors="pt"
    )
    assert (batch["input_ids"] == model.config.thinker_config.video_token_id).sum() > 0
    with torch.no_grad():
        logits = model.thinker(**{key: value for key, value in batch.items() if torch.is_tensor(value)}).logits
    assert logits.isfinite().all()
