"""What the talker starts from, assembled by Transformers' own ``generate()``.

``generate()`` of the whole model runs the thinker, puts the talker's input together, runs the talker, and decodes its
codes. With a stand-in for its first part and for its last two it only puts together, in every release of Transformers
alike: projected text and media states, the speaker's embedding, the codec's markers, the text that trails behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SAMPLING_ARGUMENTS = frozenset({"max_new_tokens", "do_sample", "top_k", "top_p", "temperature", "repetition_penalty"})
LOOP_ARGUMENTS = frozenset({"output_hidden_states", "return_dict_in_generate"})


@dataclass(frozen=True)
class Opening:
    """The talker's input.

    Attributes:
        inputs: keyword arguments of the talker's forward for the prompt, ``inputs_embeds [1, tokens, H]`` among them.
        text: what is still to be said, one state a frame, ``[1, frames, H]``.
        pad: what follows when the text is over, ``[1, 1, H]``.
        eos: the code that ends the speech.
        suppressed: codes that are never made.
        top_k: that ``generate()`` draws with.
        top_p: likewise.
        repetition_penalty: likewise.
    """

    inputs: dict[str, Any]
    text: Tensor
    pad: Tensor
    eos: int
    suppressed: tuple[int, ...]
    top_k: int
    top_p: float
    repetition_penalty: float

    @property
    def prompt_tokens(self) -> int:
        return int(self.inputs["inputs_embeds"].shape[1])


def assemble(
    model: Any, tensors: dict[str, Any], written: Any, *, eos: int, speaker: str, sound_in_video: bool = False
) -> Opening:
    """Puts the talker's input together.

    The caller keeps others off the model meanwhile: methods of its parts are replaced.

    Args:
        model: with a talker.
        tensors: the conversation, keyword arguments of the thinker; batch of one.
        written: the text with its hidden states, from `written_text`.
        eos: id of the end marker in the text.
        speaker: as the talker's config spells it.
        sound_in_video: the audio features belong in part to videos.
    """
    taken: dict[str, Any] = {}
    groups = model.talker.config.num_code_groups

    def take(**arguments: Any) -> Any:
        taken.update(arguments)
        nothing = torch.zeros((1, groups), dtype=torch.long, device=arguments["inputs_embeds"].device)
        return SimpleNamespace(hidden_states=[(None, nothing)], sequences=nothing[:, :1])

    def silence(codes: Tensor, **_: Any) -> Tensor:
        return codes.new_zeros((1, 1, 0), dtype=torch.float32)

    sound = {"use_audio_in_video": True, "talker_use_audio_in_video": True} if sound_in_video else {}
    with (
        torch.no_grad(),
        borrowed(model.thinker, "generate", lambda **_: written),
        borrowed(model.talker, "generate", take),
        borrowed(model.code2wav, "chunked_decode", silence),
    ):
        model.generate(**tensors, **sound, return_audio=True, speaker=speaker, thinker_eos_token_id=eos)
    text, pad = taken.pop("trailing_text_hidden"), taken.pop("tts_pad_embed")
    ends, suppressed = taken.pop("eos_token_id"), taken.pop("suppress_tokens")
    sampling = {name: taken.pop(name) for name in SAMPLING_ARGUMENTS}
    for name in LOOP_ARGUMENTS:
        taken.pop(name)
    return Opening(
        inputs=taken,
        text=text,
        pad=pad,
        eos=int(ends),
        suppressed=tuple(int(code) for code in suppressed),
        top_k=int(sampling["top_k"]),
        top_p=float(sampling["top_p"]),
        repetition_penalty=float(sampling["repetition_penalty"]),
    )


def written_text(model: Any, prompt: Tensor, states: Tensor | None, tokens: tuple[int, ...], eos: int) -> Any:
    """What the thinker's ``generate`` would give had it written this text.

    Of the hidden states, the talker's input takes the embeddings of text (number 0) and, where media stand in the
    prompt, one layer's states. The end marker is always there, so that the last word is spoken also when the text was
    cut at its limit.

    Args:
        model: the whole.
        prompt: ids, ``[1, tokens]``.
        states: of that layer, ``[1, tokens, hidden]``.
        tokens: ids of the text, without end marker.
        eos: the end marker.
    """
    said = prompt.new_tensor([tokens])
    with torch.no_grad():
        embeddings = model.thinker.get_input_embeddings()(torch.cat([prompt, said], dim=1))
    layers = {0: embeddings, model.config.talker_config.accept_hidden_layer: states}
    sequences = torch.cat([prompt, said, prompt.new_tensor([[eos]])], dim=1)
    return SimpleNamespace(sequences=sequences, hidden_states=(layers,))


@contextmanager
def borrowed(module: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Replaces a method of one module, not of its class."""
    own = module.__dict__.get(name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)
