"""A sample as the thinker reads it: prompt and answer in one sequence, and the positions that are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from omnifp4.chat.errors import ChatError
from omnifp4.chat.inputs import build_inputs, special_tokens
from omnifp4.chat.messages import normalise
from omnifp4.errors import OmniFP4Error
from omnifp4.evaluation.data import Sample, read_media


@dataclass(frozen=True)
class EncodedSample:
    """One sequence.

    Attributes:
        sample: what it was made of.
        tensors: keyword arguments of the thinker; batch of one, on the host.
        sound_in_video: see `ModelInputs`.
        prompt_tokens: tokens before the answer.
        positions: int64 ``[n]``: where the next token is scored.
        targets: int64 ``[n]``: that token.
        sha256: of all this.
    """

    sample: Sample
    tensors: Mapping[str, Any]
    sound_in_video: bool
    prompt_tokens: int
    positions: Tensor
    targets: Tensor
    sha256: str


def encode(sample: Sample, processor: Any, config: Any) -> EncodedSample:
    """Applies template and processor, and puts the answer behind the prompt.

    With an answer, its tokens and the end marker are scored. Without one, the text of the user's last turn is: the
    ordinary tokens behind that turn's start, media and markers left out.

    Args:
        sample: media are read here.
        processor: of the reference.
        config: the reference's, for its token ids.

    Raises:
        OmniFP4Error: a medium cannot be read, the sequence is too long, or nothing in it can be scored.
    """
    markers = sorted(special_tokens(processor))
    try:
        normalise(list(sample.messages), markers=markers)
    except ChatError as error:
        raise OmniFP4Error(f"sample {sample.name!r}: {error}") from error
    inputs = build_inputs(SimpleNamespace(config=config), processor, read_media(sample), device="cpu")
    tensors = dict(inputs.tensors)
    prompt = tensors["input_ids"]
    prompt_tokens = int(prompt.shape[1])
    if sample.answer is not None:
        if marker := next((one for one in markers if one in sample.answer), None):
            raise OmniFP4Error(f"sample {sample.name!r} has the marker {marker!r} in its answer", hint="leave it out")
        ids = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        said = prompt.new_tensor([[*ids, config.im_end_token_id]])
        tensors["input_ids"] = torch.cat([prompt, said], dim=1)
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
        positions = torch.arange(prompt_tokens - 1, prompt_tokens - 1 + said.shape[1])
        targets = said[0]
    else:
        positions = _text_positions(prompt[0].tolist(), processor, config)
        targets = prompt[0][positions + 1]
    if not len(positions):
        raise OmniFP4Error(f"sample {sample.name!r} has no text that could be scored", hint="give it an answer")
    most = config.thinker_config.text_config.max_position_embeddings
    if tensors["input_ids"].shape[1] > most:
        raise OmniFP4Error(f"sample {sample.name!r} has {tensors['input_ids'].shape[1]} tokens; the context has {most}")
    digest = _digest(tensors, positions, inputs.sound_in_video)
    return EncodedSample(sample, tensors, inputs.sound_in_video, prompt_tokens, positions, targets, digest)


def data_digest(samples: Sequence[EncodedSample]) -> str:
    """Of all samples, their tasks included."""
    digest = hashlib.sha256()
    for item in samples:
        digest.update(f"{item.sample.name}|{item.sample.task}|{item.sample.speak}|{item.sha256}\n".encode())
    return digest.hexdigest()


def _text_positions(ids: list[int], processor: Any, config: Any) -> Tensor:
    """Positions of the last user turn whose next token is ordinary text."""
    special = set(processor.tokenizer.convert_tokens_to_ids(sorted(special_tokens(processor))))
    turns = [place for place, token in enumerate(ids[:-1]) if (token, ids[place + 1]) == _user_turn(config)]
    begin = turns[-1] + 2
    end = ids.index(config.im_end_token_id, begin)
    return torch.tensor([place for place in range(begin, end - 1) if ids[place + 1] not in special], dtype=torch.int64)


def _user_turn(config: Any) -> tuple[int, int]:
    return config.im_start_token_id, config.user_token_id


def _digest(tensors: Mapping[str, Any], positions: Tensor, sound_in_video: bool) -> str:
    digest = hashlib.sha256(repr((positions.tolist(), sound_in_video)).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"|{name}{tuple(value.shape)}{value.dtype}|".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
