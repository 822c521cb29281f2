"""Makes the tiny model's byte-level BPE vocabulary from plain text. Run once; the result is package data.

    python -m omnifp4.tiny.build_tokenizer TEXT... --assets FOLDER

The pre-tokenizer, the special tokens and their order are those of the released Qwen3-Omni tokenizer; only the merges
are fewer. Role names are single tokens because the talker compares role token ids.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The released tokenizer's pre-tokenization pattern."""

VOCABULARY = 2048
"""Tokens in all: bytes, merges and special tokens."""

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>", "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>",
    "<tts_text_bos_single>", "<|audio_pad|>",
)  # fmt: skip
"""In the released order, which gives each the released distance from ``<|endoftext|>``."""

NOT_SKIPPED = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""Tokens that the released tokenizer keeps when it decodes without special tokens."""

ROLES = ("system", "user", "assistant")

MODERN_TEXT = (
    "You are a helpful assistant. You are a virtual human who can see, hear and speak.",
    "Hello! How can I help you today? Please tell me what you see in this image.",
    "What does the speaker say in this audio? What happens in this video? Please describe the picture in one sentence.",
    "The speaker says the digit zero, one, two, three, four, five, six, seven, eight, nine.",
    "I heard the number. The image shows a handwritten number. There is no sound in the video.",
    "The weather today is warm and sunny, with a light wind from the south.",
    "Quantization makes a language model smaller: each weight is stored in four bits with a scale for every block.",
    "The computer reads text, image, audio and video, and answers with text and speech.",
    "Thank you very much. You're welcome! I don't know, but I think it's a question about music, people and language.",
    "Write a short story about a child, a dog and a machine that could talk.",
)
"""Chat-like English, so that the vocabulary is not only that of the older text."""


def train(texts: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Trains the merges.

    Args:
        texts: plain text; its licence must allow the vocabulary to be published.

    Returns:
        The vocabulary without special tokens, and the merges in order.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def corpus() -> Iterator[str]:
        for text in texts:
            for line in text.splitlines(keepends=True):
                # A play names its speakers on lines of their own, which would spend hundreds of merges on names.
                if not line.rstrip().endswith(":") or line.count(" ") > 2:
                    yield line
        for _ in range(60):
            yield from MODERN_TEXT
        for role in ROLES:
            for _ in range(2000):
                yield f"{role}\n"

    tokenizer.train_from_iterator(corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def tokenizer_config(first_special: int) -> dict[str, object]:
    """The ``tokenizer_config.json`` whose special tokens begin at id `first_special`."""
    added = {
        str(first_special + index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token not in NOT_SKIPPED,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    }
    roles = {
        "image_token": "<|image_pad|>",
        "audio_token": "<|audio_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token not in NOT_SKIPPED][1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": roles,
        **roles,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen3OmniMoeProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="omnifp4.tiny.build_tokenizer", description=__doc__)
    parser.add_argument("text", nargs="+", type=Path, help="plain text files, UTF-8")
    parser.add_argument("--assets", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    vocabulary, merges = train([path.read_text("utf-8") for path in options.text])
    for role in ROLES:
        if role not in vocabulary:
            raise SystemExit(f"the vocabulary lacks the role token {role!r}")
    folder: Path = options.assets
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary_text = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(vocabulary_text + "\n", "utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    config_text = json.dumps(tokenizer_config(len(vocabulary)), indent=2)
    (folder / "tokenizer_config.json").write_text(config_text + "\n", "utf-8")


if __name__ == "__main__":
    main()
