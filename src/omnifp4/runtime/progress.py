"""How far a load is, and where it stands when nothing moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LoadProgress:
    def expect(self, nbytes: int) -> None: ...

    @contextmanager
    def reading(self, file: str, tensor: str, nbytes: int) -> Iterator[None]:
        yield
