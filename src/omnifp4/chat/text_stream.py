"""Tokens to text that is final: whole characters only, and nothing that may yet become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""


class TextStream:
    """Takes tokens one by one and gives text that no later token changes.

    The concatenated pieces equal the decoding of all tokens at once, cut before the first stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._settled = 0
        self._shown = 0
        self._waiting = ""
        self.text = ""
        """All text that has been given out."""
        self.stopped = False
        """A stop string came; it is not part of the text."""

    def add(self, token: int) -> str:
        """Takes a token; returns the text that is final now, often none."""
        self._tokens.append(token)
        return self._release(self._decoded(), last=False)

    def finish(self) -> str:
        """The rest, when no token follows."""
        return self._release(self._decoded(last=True), last=True)

    def _decoded(self, last: bool = False) -> str:
        """New whole characters; decoding starts a little before, because some tokenizers glue neighbours."""
        before = self._decode(self._tokens[self._settled : self._shown])
        now = self._decode(self._tokens[self._settled :])
        if not last and (len(now) <= len(before) or now.endswith(BROKEN)):
            return ""
        self._settled, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        waiting = self._waiting + text
        places = [place for place in (waiting.find(one) for one in self._stop) if place >= 0]
        if places:
            self.stopped = True
            ready, self._waiting = waiting[: min(places)], ""
        else:
            keep = 0 if last else self._possible_start(waiting)
            ready, self._waiting = waiting[: len(waiting) - keep], waiting[len(waiting) - keep :]
        self.text += ready
        return ready

    def _possible_start(self, text: str) -> int:
        """Characters at the end of `text` that may begin a stop string."""
        longest = max((len(one) for one in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(one.startswith(text[-length:]) for one in self._stop):
                return length
        return 0
