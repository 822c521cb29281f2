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
RESERVED_SHARED_BYTES: Final = 1024
"""What the driver keeps of a multiprocessor's shared memory for every block."""
ROUTES_BYTES: Final = (MOST_EXPERTS + MOST_ROWS) * 16 + MOST_ROWS * 8 * 4 + 128
"""The router's list in shared memory, at most; what follows begins at a multiple of 128 bytes."""
SLICE_SUM_BYTES: Final = 2 * 2 * (8 * 20 + 16) * 4
"""Two sets of a warp's sums of 32 rows and eight tokens, as experts.cu lays them out."""


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
            most_chunks = 4 if name.startswith("heads") else 2  # the experts' streams keep activations in registers
            if value % CHUNK or split_columns(value, most_chunks=most_chunks) is None:
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


@dataclass(frozen=True, slots=True)
class Stream:
    """How teams of warps stream an expert matrix for several tokens; the names are those of experts.cu.

    Attributes:
        slices: warps of a team; each takes a slice of the columns.
        chunks: of 128 columns in a slice.
        teams: of a block.
        stages: of 16 rows that a team has under way or in use.
        blocks: of a multiprocessor.
        shared_bytes: of a block.
    """

    slices: int
    chunks: int
    teams: int
    stages: int
    blocks: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.slices * self.teams * 32

    def constants(self, prefix: str) -> dict[str, int]:
        """What experts.cu calls constants, without the prefix of the matrix."""
        values = {"SLICES": self.slices, "CHUNKS": self.chunks, "TEAMS": self.teams, "STAGES": self.stages}
        return {f"{prefix}_{name}": value for name, value in (values | {"BLOCKS_PER_SM": self.blocks}).items()}


def cut_stream(
    columns: int, *, fp4: bool, blocks: int, most_stages: int, most_teams: int, shared_bytes: tuple[int, int]
) -> Stream:
    """Cut a matrix of so many columns.

    Args:
        columns: inputs of a row.
        fp4: FP4 codes with scales, else BF16.
        blocks: of a multiprocessor, as wished; fewer if two stages do not fit otherwise.
        most_stages: stages under way or in use.
        most_teams: of a block.
        shared_bytes: that one block may have, and that a multiprocessor has.

    Raises:
        ValueError: not even two stages fit.
    """
    found = split_columns(columns, most_chunks=2)
    if found is None:
        raise ValueError(f"{columns} columns cannot be shared equally by 16 warps of 128 or 256")
    slices, chunks = found
    stage = 2 * chunks * (1 if fp4 else 4) * 512
    row_scales = columns // 16 if fp4 else 0
    scale_set = 32 * (row_scales + (16 if fp4 and row_scales % 32 == 0 else 0))
    for per_processor in range(blocks, 0, -1):
        room = min(shared_bytes[0], shared_bytes[1] // per_processor - RESERVED_SHARED_BYTES) - ROUTES_BYTES
        for teams in range(max(1, min(most_teams, 16 // slices)), 0, -1):
            for stages in range(most_stages, 2 if per_processor > 1 or teams > 1 else 1, -1):
                team = slices * (SLICE_SUM_BYTES + stages * stage) + (stages // 2 + 1) * scale_set
                if teams * team <= room:
                    return Stream(slices, chunks, teams, stages, per_processor, teams * team)
    raise ValueError(f"{columns} columns need more shared memory than {shared_bytes[0]} bytes a block")


def tiles_for(rows: int) -> int:
    """Matrix columns in eights that hold so many tokens: 1, 2 or 4."""
    return next(tiles for tiles in (1, 2, 4) if rows <= 8 * tiles)
