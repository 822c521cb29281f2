"""How the decode kernels are cut for a model's sizes and a number of rows (tokens of one step)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CHUNK: Final = 128
"""Columns that a warp's lanes take together; every input width is a multiple of it."""
PAGE: Final = 64
"""Tokens in a page of the cache."""
MOST_ROWS: Final = 32
"""Tokens of one step: four matrix instructions' columns."""
MOST_EXPERTS: Final = 256
STATIC_SHARED_BYTES: Final = 48 * 1024


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a mixture-of-experts decoder.

    Attributes:
        hidden: width of the residual stream.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: width of a head.
        experts: routed experts of a layer.
        top_k: experts of a token.
        inner: width of an expert.
        normalise_top_k: the chosen experts' weights add up to 1.
        qk_norm: queries and keys are normalised per head.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    inner: int
    normalise_top_k: bool = True
    qk_norm: bool = True

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.kv_heads

    @property
    def qkv(self) -> int:
        """Rows of the joined q, k and v projections."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def why_not(self) -> str:
        """Why the kernels cannot run this shape; empty if they can."""
        for name, value in (
            ("hidden", self.hidden),
            ("inner", self.inner),
            ("heads x head_dim", self.heads * self.head_dim),
        ):
            if value % CHUNK or split_columns(value) is None:
                return f"{name} is {value}, and the kernels take multiples of {CHUNK} that 16 warps or fewer can share"
        if self.head_dim not in (64, 128):
            return f"head_dim is {self.head_dim}, and the kernels take 64 or 128"
        if self.heads % self.kv_heads or self.group > 16:
            return f"{self.heads} query heads over {self.kv_heads} key/value heads: at most 16 may share one"
        if not 1 <= self.top_k <= min(8, self.experts) or self.experts > MOST_EXPERTS:
            return f"{self.top_k} of {self.experts} experts: the kernels take up to 8 of {MOST_EXPERTS}"
        return ""


def split_columns(
    columns: int, most_warps: int = 16, most_chunks: int = 4, prefer_chunks: int = 2
) -> tuple[int, int] | None:
    """Warps, and chunks of each, that share a row of `columns`; None if no equal split exists."""
    chunks = columns // CHUNK
    splits = [
        (chunks // each, each)
        for each in range(1, most_chunks + 1)
        if chunks % each == 0 and chunks // each <= most_warps
    ]
    if not splits:
        return None
    return min(splits, key=lambda split: (abs(split[1] - prefer_chunks), split[1]))


def tiles_for(rows: int) -> int:
    """Matrix columns in eights that hold so many tokens: 1, 2 or 4."""
    return next(tiles for tiles in (1, 2, 4) if rows <= 8 * tiles)
