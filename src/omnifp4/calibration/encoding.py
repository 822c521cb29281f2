"""Conversations as a model reads them: prompt and answer in one sequence, through the checkpoint's own processor."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Final

import torch

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.errors import CheckpointError, ModelError, OmniFP4Error
from omnifp4.evaluation.data import Sample, read_media
from omnifp4.receipt.calibration import Cause
from omnifp4.segments.skeleton import MODEL_TYPES, TEXT_TYPES

TEXT: Final = "text"
MEDIA_TOKENS: Final = {"image": "image_token_id", "audio": "audio_token_id", "video": "video_token_id"}
"""Kinds of tokens that stand for media, and their ids' names in an omni config."""


@dataclass(frozen=True, slots=True)
class CalibrationSequence:
    """One conversation as token ids and features.

    Attributes:
        sample: what it was made of.
        tensors: keyword arguments of the model; batch of one, on the host.
        sound_in_video: see `ModelInputs`.
        prompt_tokens: tokens before the answer.
        counts: tokens by what they are: text, image, audio, video.
        sha256: of the tensors.
    """

    sample: Sample
    tensors: Mapping[str, Any]
    sound_in_video: bool
    prompt_tokens: int
    counts: Mapping[str, int]
    sha256: str


class SequenceError(OmniFP4Error):
    """A conversation that cannot become a sequence.

    Attributes:
        cause: what kind of failure.
    """

    def __init__(self, cause: Cause, error: Exception) -> None:
        """`error` is what was raised."""
        super().__init__(told(error))
        self.cause = cause


def told(error: Exception) -> str:
    """An exception in one line: our own as they stand, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OmniFP4Error) else f"{type(error).__name__}: {text}"


class Reader(ABC):
    """Makes sequences for one checkpoint.

    Attributes:
        name: of the checkpoint.
        reads: modalities of conversations that its model takes.
    """

    name: str
    reads: frozenset[str]

    @abstractmethod
    def encode(self, sample: Sample) -> CalibrationSequence:
        """One conversation.

        Raises:
            SequenceError: a medium cannot be read, or template and processor fail.
        """


class OmniReader(Reader):
    """Qwen3-Omni."""

    reads = frozenset({TEXT, "image", "audio", "video", "mixed"})

    def __init__(self, folder: str, name: str) -> None:
        """Raises ChatError if the folder has no processor."""
        from omnifp4.chat.loading import open_processor

        self.name = name
        self._processor = open_processor(folder)
        import transformers

        self._config: Any = transformers.AutoConfig.from_pretrained(folder)

    def encode(self, sample: Sample) -> CalibrationSequence:
        """See `Reader.encode`."""
        from omnifp4.chat.inputs import build_inputs

        try:
            messages = read_media(sample)
        except Exception as error:
            raise SequenceError(Cause.MEDIA, error) from error
        try:
            inputs = build_inputs(SimpleNamespace(config=self._config), self._processor, messages, device="cpu")
            tensors = dict(inputs.tensors)
            if sample.answer is not None:
                ids = self._processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
                said = tensors["input_ids"].new_tensor([[*ids, self._config.im_end_token_id]])
                tensors["input_ids"] = torch.cat([tensors["input_ids"], said], dim=1)
                tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
            thinker = self._config.thinker_config
            _check_length(tensors["input_ids"], thinker.text_config.max_position_embeddings)
        except Exception as error:
            raise SequenceError(Cause.PROMPT, error) from error
        marks = {kind: getattr(thinker, key) for kind, key in MEDIA_TOKENS.items()}
        counts = _counts(tensors["input_ids"], marks)
        return CalibrationSequence(
            sample, tensors, inputs.sound_in_video, inputs.prompt_tokens, counts, _digest(tensors)
        )


class TextReader(Reader):
    """A model of text alone: its tokenizer, with the chat template if it has one."""

    reads = frozenset({TEXT})

    def __init__(self, folder: str, name: str) -> None:
        """Raises CheckpointError if the folder has no tokenizer."""
        import transformers

        self.name = name
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
            config: Any = transformers.AutoConfig.from_pretrained(folder)
        except Exception as error:  # damaged files raise whatever, tokenizers a plain Exception
            raise CheckpointError(
                f"{folder}: its tokenizer cannot be read: {told(error)}",
                hint="copy the tokenizer's files into the folder",
            ) from None
        self._most = int(config.max_position_embeddings)

    def encode(self, sample: Sample) -> CalibrationSequence:
        """See `Reader.encode`."""
        try:
            turns = [
                {"role": message["role"], "content": "".join(part["text"] for part in message["content"])}
                for message in sample.messages
            ]
            prompt = self._ids(turns, answer=None)
            ids = prompt if sample.answer is None else self._ids(turns, answer=sample.answer)
            if not ids:
                raise OmniFP4Error(f"sample {sample.name!r} has no tokens")
            tensor = torch.tensor([ids])
            _check_length(tensor, self._most)
        except Exception as error:
            raise SequenceError(Cause.PROMPT, error) from error
        tensors = {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}
        return CalibrationSequence(sample, tensors, False, len(prompt), {TEXT: len(ids)}, _digest(tensors))

    def _ids(self, turns: list[dict[str, str]], *, answer: str | None) -> list[int]:
        said = turns if answer is None else [*turns, {"role": "assistant", "content": answer}]
        if self._tokenizer.chat_template is None:
            text = "\n".join(turn["content"] for turn in said)
            return list(self._tokenizer(text)["input_ids"])
        text = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=answer is None)
        if said[-1]["content"].strip() not in text:
            raise OmniFP4Error("the checkpoint's chat template drops text of the conversation")
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def open_reader(checkpoint: Checkpoint) -> Reader:
    """The reader of a checkpoint's model.

    Raises:
        OmniFP4Error: a model type that cannot be calibrated, or its processor is missing.
    """
    kind, name = checkpoint.config.get("model_type"), Path(checkpoint.location).name
    if kind in MODEL_TYPES:
        return OmniReader(checkpoint.location, name)
    if kind in TEXT_TYPES:
        return TextReader(checkpoint.location, name)
    raise ModelError(
        f"{checkpoint.location}: a model of type {kind!r} cannot be calibrated",
        hint=f"allowed: {', '.join((*MODEL_TYPES, *TEXT_TYPES))}; the data-free recipes take other types",
    )


def bundled_reader() -> Reader:
    """The reader of the bundled tiny omni model, for counting where no model is given."""
    from omnifp4.tiny.checkpoint import TINY_FILES, asset_bytes

    with TemporaryDirectory() as folder:
        for name in (*TINY_FILES, "config.json"):
            (Path(folder) / name).write_bytes(asset_bytes(name))
        return OmniReader(folder, "the bundled tiny model")


def sequences_digest(sequences: Sequence[CalibrationSequence]) -> str:
    """Of all sequences in order."""
    digest = hashlib.sha256()
    for one in sequences:
        digest.update(f"{one.sample.name}|{one.sample.speak}|{one.sound_in_video}|{one.sha256}\n".encode())
    return digest.hexdigest()


def _check_length(ids: torch.Tensor, most: int) -> None:
    if ids.shape[1] > most:
        raise OmniFP4Error(f"{ids.shape[1]} tokens; the context has {most}", hint="shorten the conversation")


def _counts(ids: torch.Tensor, marks: Mapping[str, int]) -> dict[str, int]:
    counts = {kind: int((ids == mark).sum()) for kind, mark in marks.items()}
    return {TEXT: ids.numel() - sum(counts.values()), **{kind: count for kind, count in counts.items() if count}}


def _digest(tensors: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"|{name}{tuple(value.shape)}{value.dtype}|".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
