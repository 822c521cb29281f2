"""One reader for the different things that an omni model's ``generate()`` returns.

A tensor without speech; sequences and a waveform with it; an output object where one was asked for; a list of
waveforms for a batch; and in older versions a pair even without speech, its second half None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from omnifp4.chat.answer import Waveform
from omnifp4.chat.errors import ChatError


@dataclass(frozen=True, slots=True)
class Generated:
    """What ``generate()`` made, in one form.

    Attributes:
        tokens: per sample, ids after the prompt, padding included.
        waveforms: per sample, or None without speech.
    """

    tokens: tuple[tuple[int, ...], ...]
    waveforms: tuple[Waveform, ...] | None


def read_generated(output: Any, prompt_tokens: int) -> Generated:
    """Reads the result of ``generate()`` of any version.

    Args:
        output: a tensor ``(batch, tokens)``; an object with ``sequences``; or a pair of either and speech, where speech
            is None, a tensor ``(batch, 1, samples)``, ``(batch, samples)`` or ``(samples,)``, or a list of such.
        prompt_tokens: leading tokens of every sequence that are the prompt.

    Raises:
        ChatError: it is none of these.
    """
    speech = None
    if not hasattr(output, "sequences") and isinstance(output, tuple | list) and len(output) == 2:
        output, speech = output
    sequences = getattr(output, "sequences", output)
    if not hasattr(sequences, "tolist") or getattr(sequences, "ndim", 0) not in (1, 2):
        raise ChatError(f"generate() returned {type(output).__name__}, in which no sequences were found")
    rows = sequences.tolist()
    rows = rows if sequences.ndim == 2 else [rows]
    tokens = tuple(tuple(int(token) for token in row[prompt_tokens:]) for row in rows)
    if speech is None:
        return Generated(tokens, None)
    if isinstance(speech, list | tuple):
        waveforms = [_samples(one) for one in speech]
    elif len(rows) > 1:
        waveforms = [_samples(speech[number]) for number in range(len(speech))]
    else:
        waveforms = [_samples(speech)]
    if len(waveforms) != len(rows):
        raise ChatError(f"generate() returned {len(waveforms)} waveforms for {len(rows)} sequences")
    return Generated(tokens, tuple(waveforms))


def _samples(speech: Any) -> Waveform:
    array = speech.detach().float().cpu().numpy() if hasattr(speech, "detach") else np.asarray(speech, np.float32)
    return np.ascontiguousarray(array.reshape(-1), np.float32)
