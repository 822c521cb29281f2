"""How the kernels of a decode step are cut and compiled, for a model's shape, a number of rows and a kind of GPU.

Pure arithmetic: it says the same on a machine without a GPU, where the sources can still be compiled for one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omnifp4.kernels.cuda.launching import Wanted, wanted
from omnifp4.kernels.cuda.shapes import (
    MOST_ROWS,
    PAGE,
    DecoderShape,
    cut_stream,
    split_columns,
    tiles_for,
)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is free in how the kernels are cut; the figures behind the defaults are in benchmarks/kernel_log.md.

    Attributes:
        gate_up_units: 8-feature units of a gate-up block for one token.
        gate_up_blocks: gate-up blocks of a multiprocessor.
        gate_up_stages: most stages of 16 rows that a team of warps has under way, for several tokens.
        gate_up_teams: most teams of a block.
        gate_up_run: tiles of 32 rows that a team takes at a time; a power of 2.
        down_blocks: down blocks of a multiprocessor.
        down_stages: as `gate_up_stages`.
        down_teams: as `gate_up_teams`.
        down_run: as `gate_up_run`.
        attention_warps: of an attention block.
        attention_blocks: blocks to split the context for.
        min_stretch: tokens below which the context is not split.
        dependent: start a kernel while the one ahead of it ends.
    """

    gate_up_units: int = 3
    gate_up_blocks: int = 2
    gate_up_stages: int = 3
    gate_up_teams: int = 1
    gate_up_run: int = 2
    down_blocks: int = 4
    down_stages: int = 3
    down_teams: int = 1
    down_run: int = 2
    attention_warps: int = 8
    attention_blocks: int = 128
    min_stretch: int = 256
    dependent: bool = True


@dataclass(frozen=True, slots=True)
class Processor:
    """What of a GPU decides how kernels are cut.

    Attributes:
        count: of multiprocessors.
        block_bytes: shared memory that one block may have.
        bytes: shared memory of a multiprocessor.
    """

    count: int
    block_bytes: int
    bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Processor:
        """A CUDA device's."""
        found = torch.cuda.get_device_properties(device)
        optin: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return cls(found.multi_processor_count, optin, found.shared_memory_per_multiprocessor)


class DecoderPlan:
    """The kernels of a step, and the sizes of their grids and scratch.

    Attributes:
        wanted: kernels to load, by the name of the step that they do.
        is_single: there is one row, for which some steps have kernels of their own.
        splits: most stretches of a row's context.
        router_parts: partial sums of a logit.
        qkv_blocks, o_blocks, gate_up_blocks, down_blocks: of the grids; for several rows of the experts' whole grids.
    """

    def __init__(
        self, shape: DecoderShape, rows: int, fp4: dict[str, bool], processor: Processor, tuning: Tuning | None = None
    ) -> None:
        """Cuts them.

        Args:
            shape: of the model.
            rows: tokens of a step, 1 to `MOST_ROWS`.
            fp4: which matrices are FP4 (others are BF16): qkv, o, experts.
            processor: of the GPU.
            tuning: what is free.

        Raises:
            ValueError: the kernels cannot run this; `DecoderShape.why_not` says most of it before.
        """
        tuning = tuning or Tuning()
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"rows is {rows}: 1 to {MOST_ROWS}")
        if reason := shape.why_not():
            raise ValueError(reason)
        self._processor = processor
        self._tiles = tiles_for(rows)
        self.is_single = rows == 1
        self.splits = max(1, min(64, tuning.attention_blocks // (rows * shape.kv_heads)))
        qkv, self.qkv_blocks = self._linear(shape.hidden, shape.qkv, fp4["qkv"], NORM=int(self.is_single), RESIDUAL=0)
        o, self.o_blocks = self._linear(shape.heads * shape.head_dim, shape.hidden, fp4["o"], NORM=0, RESIDUAL=1)
        router_chunks = next(n for n in (4, 3, 2, 1) if shape.hidden // 128 % n == 0)
        self.router_parts = shape.hidden // 128 // router_chunks
        gate_up, down = self._experts(shape, fp4["experts"], tuning)
        # Sixteen heads of a group need twice the sums.
        attention_warps = tuning.attention_warps if shape.group <= 8 else min(4, tuning.attention_warps)
        norm = {"HIDDEN": shape.hidden, "THREADS": 256}
        self.wanted: dict[str, Wanted] = {
            "qkv": qkv,
            "o": o,
            "attention": wanted(
                "attention.cu", "attention", attention_warps * 32, FP4=int(fp4["o"]), HEADS=shape.heads,
                KV_HEADS=shape.kv_heads, HEAD_DIM=shape.head_dim, PAGE=PAGE, WARPS=attention_warps, SPLITS=self.splits,
                MIN_STRETCH=tuning.min_stretch, QK_NORM=int(shape.qk_norm),
            ),
            "router": wanted(
                "router.cu", "router", 512, FP4=int(fp4["experts"]), HIDDEN=shape.hidden, EXPERTS=shape.experts,
                TOPK=shape.top_k, NT=self._tiles, PARTS=self.router_parts, CHUNKS=router_chunks,
                SINGLE=int(self.is_single), NORMALISE_TOPK=int(shape.normalise_top_k),
            ),
            "gate_up": gate_up,
            "down": down,
            "norm": wanted("norm.cu", "rms_norm", 256, TOPK=0, **norm),
            "add_norm": wanted("norm.cu", "rms_norm", 256, TOPK=shape.top_k, **norm),
            "embed": wanted("norm.cu", "embed", 256, TOPK=0, **norm),
        }  # fmt: skip

    def _linear(self, columns: int, rows: int, fp4: bool, **constants: int) -> tuple[Wanted, int]:
        """A linear layer, and its blocks: units of 16 rows a block, so many that one wave of blocks does all."""
        # With several units of 32 tokens, or with wide weights, sixteen warps have too few registers.
        most_warps = 16 if self._tiles < 4 or (fp4 and rows // 16 <= self._processor.count) else 8
        warps, chunks = _split(columns, 2 if fp4 else 1, most_warps=most_warps)
        blocks_per_sm = 2 if self._tiles == 1 and warps <= 8 else 1
        # More than three units of 32 tokens do not fit the registers.
        units = min(3, -(-(rows // 16) // (self._processor.count * blocks_per_sm))) if fp4 else 1
        kernel = wanted(
            "linear.cu", "linear", warps * 32, shared_bytes=warps * units * 16 * (self._tiles * 8 + 1) * 4,
            FP4=int(fp4), K=columns, NT=self._tiles, UNITS=units, WARPS=warps, CHUNKS=chunks, BLOCKS_PER_SM=blocks_per_sm,
            **constants,
        )  # fmt: skip
        return kernel, -(-rows // (16 * units))

    def _experts(self, shape: DecoderShape, fp4: bool, tuning: Tuning) -> tuple[Wanted, Wanted]:
        constants = {
            "FP4": int(fp4), "HIDDEN": shape.hidden, "INNER": shape.inner, "TOPK": shape.top_k,
            "EXPERTS": shape.experts, "SINGLE": int(self.is_single), "NORMALISE_TOPK": int(shape.normalise_top_k),
            "ROUTER_PARTS": self.router_parts,
        }  # fmt: skip
        if self.is_single:
            units = tuning.gate_up_units if fp4 else 1
            warps, chunks = _split(shape.hidden, 2 if fp4 else 1)
            slot_split, slot_chunks = _slot_split(shape)
            constants |= {
                "UNITS": units, "WARPS": warps, "CHUNKS": chunks, "BLOCKS_PER_SM": tuning.gate_up_blocks,
                "S_SPLIT": slot_split, "S_CHUNKS": slot_chunks,
            }  # fmt: skip
            self.gate_up_blocks, self.down_blocks = -(-shape.inner // (8 * units)), shape.hidden // 16
            return (
                wanted("experts.cu", "gate_up_one", warps * 32, **constants),
                wanted("experts.cu", "down_one", shape.top_k * slot_split * 32, **constants),
            )
        shared = (self._processor.block_bytes, self._processor.bytes)
        up = cut_stream(
            shape.hidden, fp4=fp4, blocks=tuning.gate_up_blocks, most_stages=tuning.gate_up_stages,
            most_teams=tuning.gate_up_teams, shared_bytes=shared,
        )  # fmt: skip
        down = cut_stream(
            shape.inner, fp4=fp4, blocks=tuning.down_blocks, most_stages=tuning.down_stages,
            most_teams=tuning.down_teams, shared_bytes=shared,
        )  # fmt: skip
        # Every width is a multiple of 128: gate_up has 8 tiles of an expert at least, down 4.
        runs = {"U_RUN": min(8, tuning.gate_up_run), "D_RUN": min(4, tuning.down_run)}
        constants |= up.constants("U") | down.constants("D") | runs
        self.gate_up_blocks, self.down_blocks = self._processor.count * up.blocks, self._processor.count * down.blocks
        return (
            wanted("experts.cu", "gate_up", up.threads, shared_bytes=up.shared_bytes, **constants),
            wanted("experts.cu", "down", down.threads, shared_bytes=down.shared_bytes, **constants),
        )


def _split(columns: int, prefer: int, most_warps: int = 16) -> tuple[int, int]:
    found = split_columns(columns, most_warps=most_warps, prefer_chunks=prefer)
    if found is None:
        raise ValueError(f"{columns} columns cannot be shared equally")
    return found


def _slot_split(shape: DecoderShape) -> tuple[int, int]:
    """Warps that share a slot's row, and chunks of each; a block has 512 threads at most."""
    chunks = shape.inner // 128
    for warps in range(max(1, 16 // shape.top_k), 0, -1):
        if chunks % warps == 0:
            return warps, chunks // warps
    raise AssertionError
