"""Keys and values of all sequences under way, in pages that any of them can take."""

from __future__ import annotations

import torch

from omnifp4.decoding.engine import EngineFull
from omnifp4.kernels.cuda.shapes import PAGE, DecoderShape


class PagedCache:
    """A pool of pages, and which of them each slot has.

    Attributes:
        keys: BF16 ``[layers, pages, kv_heads, PAGE, head_dim]``.
        values: as `keys`.
        tables: int32 ``[slots, pages of a slot]`` on the device; pages of a slot in order, then the spare page.
        spare: a page that nobody reads, for what is written behind a slot's own pages.
    """

    def __init__(
        self, shape: DecoderShape, layers: int, slots: int, context_tokens: int, pages: int, device: torch.device
    ) -> None:
        """Takes the memory now, so that no later step lacks it."""
        self.spare = pages
        size = (layers, pages + 1, shape.kv_heads, PAGE, shape.head_dim)
        self.keys = torch.zeros(size, dtype=torch.bfloat16, device=device)
        self.values = torch.zeros(size, dtype=torch.bfloat16, device=device)
        self.tables = torch.full((slots, pages_for(context_tokens)), self.spare, dtype=torch.int32, device=device)
        self._free = list(range(pages))[::-1]
        self._owned: dict[int, list[int]] = {}
        self._free_slots = list(range(slots))[::-1]

    @property
    def free_pages(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def take(self, tokens: int) -> int:
        """A slot with room for so many tokens.

        Raises:
            EngineFull: no slot or too few pages are free.
        """
        wanted = pages_for(tokens)
        if not self._free_slots:
            raise EngineFull(f"{len(self._owned)} sequences are under way, the most at once")
        if wanted > len(self._free):
            raise EngineFull(f"{tokens} tokens need {wanted} pages of the cache and {len(self._free)} are free")
        slot = self._free_slots.pop()
        pages = [self._free.pop() for _ in range(wanted)]
        self._owned[slot] = pages
        table = pages + [self.spare] * (self.tables.shape[1] - wanted)
        self.tables[slot] = torch.tensor(table, dtype=torch.int32).to(self.tables.device, non_blocking=True)
        return slot

    def give_back(self, slot: int) -> None:
        """The slot's pages may be taken by others."""
        self._free.extend(self._owned.pop(slot))
        self._free_slots.append(slot)


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


def page_bytes(shape: DecoderShape, layers: int) -> int:
    """Bytes of one page over all layers, keys and values."""
    return 2 * 2 * layers * shape.kv_heads * PAGE * shape.head_dim
