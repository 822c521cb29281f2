"""The kernels of one decode step, compiled for a model's shape and a number of rows.

Every method enqueues one kernel on torch's current stream. Activations are BF16; see the sources for the arithmetic.
"FP4 order" is the order of eight neighbours that FP4 weights ask for: 0 4 1 5 2 6 3 7.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from omnifp4.kernels.cuda.launching import Kernel, Wanted, load_kernels, wanted
from omnifp4.kernels.cuda.shapes import MOST_ROWS, PAGE, STATIC_SHARED_BYTES, DecoderShape, split_columns, tiles_for

LOG2_E: Final = 1.4426950408889634
CODE_FACTOR: Final = 256.0
"""Codes unpack to their value times 2^-8."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights of a linear layer, or of all experts of a layer.

    Attributes:
        weights: FP4 codes uint8 ``[..., rows, columns / 2]``, or BF16 ``[..., rows, columns]``.
        scales: E4M3 bits uint8 ``[..., rows, columns / 16]``; None for BF16.
        factors: float32, tensor scale times `CODE_FACTOR`; per 16 rows of a linear layer, per expert of experts.
    """

    weights: Tensor
    scales: Tensor | None = None
    factors: Tensor | None = None

    @property
    def is_fp4(self) -> bool:
        return self.scales is not None

    @property
    def rows(self) -> int:
        return self.weights.shape[-2]

    @property
    def columns(self) -> int:
        return self.weights.shape[-1] * (2 if self.is_fp4 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes that are read when every weight is used."""
        parts = (self.weights, self.scales, self.factors)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is free in how the kernels are cut; the figures behind the defaults are in benchmarks/kernel_log.md.

    Attributes:
        gate_up_units: 8-feature units of a gate-up block for one token.
        gate_up_warps: of a gate-up block, for several tokens.
        gate_up_blocks: gate-up blocks of a multiprocessor.
        gate_up_ring: most chunks of 128 columns that a warp has under way.
        gate_up_ahead: load activations a chunk ahead.
        down_warps: of a down block, for several tokens.
        down_blocks: down blocks of a multiprocessor.
        down_ring: as `gate_up_ring`.
        down_ahead: as `gate_up_ahead`.
        attention_warps: of an attention block.
        attention_blocks: blocks to split the context for.
        min_stretch: tokens below which the context is not split.
        dependent: start a kernel while the one ahead of it ends.
    """

    gate_up_units: int = 3
    gate_up_warps: int = 8
    gate_up_blocks: int = 2
    gate_up_ring: int = 4
    gate_up_ahead: bool = True
    down_warps: int = 8
    down_blocks: int = 2
    down_ring: int = 6
    down_ahead: bool = False
    attention_warps: int = 8
    attention_blocks: int = 128
    min_stretch: int = 256
    dependent: bool = True


@dataclass
class Routing:
    """Which experts each row goes to, as the router leaves it on the device.

    With one row only the logits are there: the kernels after the router choose by themselves.

    Attributes:
        logits: float32 ``[parts, rows, experts]``, to be summed over the parts and rounded to BF16.
        experts: int32 ``[rows, top_k]``; -1 for an idle row.
        weights: float32 ``[rows, top_k]``.
        places: int32 ``[rows * top_k]``: row of gate-up's output that belongs to a slot.
        active: int32 ``[entries, 4]``: expert, first place, tokens (at most 8), unused.
        counts: int32 ``[2]``: entries of `active` that are in use, and distinct experts.
        slots: int32 ``[rows * top_k]``: slots in order of expert.
        done: uint32 ``[1]``, 0 between launches.
    """

    logits: Tensor
    experts: Tensor
    weights: Tensor
    places: Tensor
    active: Tensor
    counts: Tensor
    slots: Tensor
    done: Tensor


@dataclass
class Splits:
    """Scratch of attention over a split context: float32 parts, their maxima and sums, and counters (0 in between)."""

    parts: Tensor
    tops: Tensor
    done: Tensor


@dataclass
class DecoderKernels:
    """See the module.

    Attributes:
        shape: of the model.
        rows: tokens of a step, 1 to `MOST_ROWS`.
        device: where it runs.
        fp4: which matrices are FP4 (others are BF16): qkv, o, experts.
        tuning: how the kernels are cut.
    """

    shape: DecoderShape
    rows: int
    device: torch.device
    fp4: dict[str, bool]
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MOST_ROWS:
            raise ValueError(f"rows is {self.rows}: 1 to {MOST_ROWS}")
        if reason := self.shape.why_not():
            raise ValueError(reason)
        self.is_single = self.rows == 1
        shape, tuning = self.shape, self.tuning
        self.tiles = tiles_for(self.rows)
        pairs = self.rows * shape.kv_heads
        self.splits = max(1, min(64, tuning.attention_blocks // pairs))
        qkv_split, self._qkv_units = self._linear(shape.hidden, shape.qkv, self.fp4["qkv"])
        o_split, self._o_units = self._linear(shape.heads * shape.head_dim, shape.hidden, self.fp4["o"])
        up_warps, up_chunks = _split(shape.hidden, 2 if self.fp4["experts"] else 1)
        if not self.is_single:
            up_warps = tuning.gate_up_warps
        up_ring, up_group = _ring(shape.hidden, tuning.gate_up_ring if self.fp4["experts"] else 2)
        down_ring, down_group = _ring(shape.inner, tuning.down_ring if self.fp4["experts"] else 2)
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._up_blocks, self._down_blocks = processors * tuning.gate_up_blocks, processors * tuning.down_blocks
        slot_split, slot_chunks = _slot_split(shape)
        router_chunks = next(n for n in (4, 3, 2, 1) if shape.hidden // 128 % n == 0)
        self._router_parts = shape.hidden // 128 // router_chunks
        experts = {
            "FP4": int(self.fp4["experts"]), "HIDDEN": shape.hidden, "INNER": shape.inner, "TOPK": shape.top_k,
            "EXPERTS": shape.experts, "SINGLE": int(self.is_single), "NORMALISE_TOPK": int(shape.normalise_top_k),
            "ROUTER_PARTS": self._router_parts, "UNITS": tuning.gate_up_units if self.fp4["experts"] else 1,
            "WARPS": up_warps, "CHUNKS": up_chunks, "BLOCKS_PER_SM": tuning.gate_up_blocks, "RING": up_ring,
            "GROUP": up_group, "X_AHEAD": int(tuning.gate_up_ahead), "D_WARPS": tuning.down_warps,
            "D_BLOCKS_PER_SM": tuning.down_blocks, "D_RING": down_ring, "D_GROUP": down_group,
            "D_X_AHEAD": int(tuning.down_ahead), "S_SPLIT": slot_split, "S_CHUNKS": slot_chunks,
        }  # fmt: skip
        # Sixteen heads of a group need twice the sums.
        self._attention_warps = tuning.attention_warps if shape.group <= 8 else min(4, tuning.attention_warps)
        attention = {
            "FP4": int(self.fp4["o"]), "HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "HEAD_DIM": shape.head_dim,
            "PAGE": PAGE, "WARPS": self._attention_warps, "SPLITS": self.splits, "MIN_STRETCH": tuning.min_stretch,
            "QK_NORM": int(shape.qk_norm),
        }  # fmt: skip
        norm = {"HIDDEN": shape.hidden, "THREADS": 256}
        wanted_kernels: dict[str, Wanted] = {
            "qkv": wanted("linear.cu", "linear", qkv_split["WARPS"] * 32, **qkv_split, NORM=int(self.is_single), RESIDUAL=0),
            "o": wanted("linear.cu", "linear", o_split["WARPS"] * 32, **o_split, NORM=0, RESIDUAL=1),
            "attention": wanted("attention.cu", "attention", self._attention_warps * 32, **attention),
            "router": wanted(
                "router.cu", "router", 512, FP4=int(self.fp4["experts"]), HIDDEN=shape.hidden, EXPERTS=shape.experts,
                TOPK=shape.top_k, NT=self.tiles, PARTS=self._router_parts, CHUNKS=router_chunks,
                SINGLE=int(self.is_single), NORMALISE_TOPK=int(shape.normalise_top_k),
            ),
            "gate_up": wanted(
                "experts.cu", "gate_up_one" if self.is_single else "gate_up", up_warps * 32, **experts
            ),
            "down": wanted("experts.cu", "down_one", shape.top_k * slot_split * 32, **experts)
            if self.is_single
            else wanted("experts.cu", "down", tuning.down_warps * 32, **experts),
            "norm": wanted("norm.cu", "rms_norm", 256, TOPK=0, **norm),
            "add_norm": wanted("norm.cu", "rms_norm", 256, TOPK=shape.top_k, **norm),
            "embed": wanted("norm.cu", "embed", 256, TOPK=0, **norm),
        }  # fmt: skip
        self._kernels: dict[str, Kernel] = load_kernels(wanted_kernels, self.device, dependent=tuning.dependent)

    def _linear(self, columns: int, rows: int, fp4: bool) -> tuple[dict[str, int], int]:
        """Constants of a linear layer, and its units of 16 rows a block: so many that one wave of blocks does all."""
        warps, chunks = _split(columns, 2 if fp4 else 1, most_warps=16 if self.tiles < 4 else 8)
        blocks_per_sm = 2 if self.tiles == 1 and warps <= 8 else 1
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        units = -(-(rows // 16) // (processors * blocks_per_sm)) if fp4 else 1
        while units > 1 and warps * units * 16 * (self.tiles * 8 + 1) * 4 > STATIC_SHARED_BYTES - 6144:
            units -= 1
        return {
            "FP4": int(fp4), "K": columns, "NT": self.tiles, "UNITS": units, "WARPS": warps, "CHUNKS": chunks,
            "BLOCKS_PER_SM": blocks_per_sm,
        }, units  # fmt: skip

    def routing_buffers(self) -> Routing:
        """What `router` fills."""
        rows, shape, slots = self.rows, self.shape, self.rows * self.shape.top_k

        def new(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        return Routing(
            logits=new(self._router_parts, rows, shape.experts, dtype=torch.float32),
            experts=new(rows, shape.top_k),
            weights=new(rows, shape.top_k, dtype=torch.float32),
            places=new(slots),
            # An expert has one entry, and one more for each further eight tokens.
            active=new(min(shape.experts, slots) + slots // 8, 4),
            counts=new(2),
            slots=new(slots),
            done=new(1),
        )

    def split_buffers(self) -> Splits:
        """Scratch for `attention`."""
        pairs, group = self.rows * self.shape.kv_heads, self.shape.group
        return Splits(
            torch.zeros((pairs, self.splits, group, self.shape.head_dim), dtype=torch.float32, device=self.device),
            torch.zeros((pairs, self.splits, group, 2), dtype=torch.float32, device=self.device),
            torch.zeros(pairs, dtype=torch.int32, device=self.device),
        )

    def embed(
        self, table: Tensor, rows: Tensor, slots: tuple[Tensor, Tensor, Tensor], residual: Tensor, places: Tensor
    ) -> None:
        """Begin a step: ``residual[r] = table[tokens[rows[r]]]``, and where each row stands.

        Args:
            table: BF16 ``[vocabulary, hidden]``.
            rows: int32 ``[rows]``, slot of each row; below 0: idle.
            slots: int32 ``[slots]`` each: token to read, tokens in the cache, rotary position minus these.
            residual: ``[rows, hidden]``.
            places: int32 ``[rows, 4]``: slot, tokens in the cache, rotary position.
        """
        self._kernels["embed"].launch((self.rows,), table, rows, *slots, residual, places)

    def norm(
        self,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        *,
        natural: Tensor | None = None,
        fp4_order: Tensor | None = None,
        add: tuple[Tensor, Routing] | None = None,
    ) -> None:
        """RMSNorm of ``[rows, hidden]``, after adding the experts' outputs ``[rows * top_k, hidden]`` if given."""
        outputs, routing = add if add is not None else (None, None)
        kernel = self._kernels["norm" if add is None else "add_norm"]
        kernel.launch(
            (self.rows,),
            residual,
            outputs,
            routing.experts if routing else None,
            routing.weights if routing else None,
            weight,
            eps,
            natural,
            fp4_order,
        )

    def qkv(self, matrix: Matrix, x: Tensor, norm_weight: Tensor | None, eps: float, out: Tensor) -> None:
        """Joined projections; with one row `x` is the residual stream and is normalised on the way."""
        blocks = -(-matrix.rows // (16 * self._qkv_units))
        arguments = (matrix.weights, matrix.scales, matrix.factors, x, norm_weight, eps, None, out)
        self._kernels["qkv"].launch((blocks,), *arguments, self.rows, matrix.rows)

    def attention(
        self,
        qkv: Tensor,
        norms: tuple[Tensor | None, Tensor | None],
        eps: float,
        rotary: tuple[Tensor, Tensor],
        places: Tensor,
        pages: Tensor,
        cache: tuple[Tensor, Tensor],
        splits: Splits,
        out: Tensor,
    ) -> None:
        """Attention of every row's new token, which goes into the cache.

        Args:
            qkv: ``[rows, qkv]``.
            norms: of queries and keys, ``[head_dim]``.
            eps: of these norms.
            rotary: cosines and sines BF16 ``[positions, head_dim / 2]``.
            places: int32 ``[rows, 4]`` from `embed`, at least two kernels ago.
            pages: int32 ``[slots, pages of a slot]``.
            cache: keys and values ``[pages, kv_heads, PAGE, head_dim]`` of the layer.
            splits: from `split_buffers`.
            out: ``[rows, heads * head_dim]``, in FP4 order where o is FP4.
        """
        scale = self.shape.head_dim**-0.5 * LOG2_E
        self._kernels["attention"].launch(
            (self.shape.kv_heads, self.splits, self.rows),
            qkv, norms[0], norms[1], eps, rotary[0], rotary[1], places, pages, pages.shape[1],
            cache[0], cache[1], splits.parts, splits.tops, splits.done, out, scale,
        )  # fmt: skip

    def o(self, matrix: Matrix, x: Tensor, residual: Tensor) -> None:
        """Output projection, added to the residual stream."""
        blocks = -(-matrix.rows // (16 * self._o_units))
        arguments = (matrix.weights, matrix.scales, matrix.factors, x, None, 0.0, residual, residual)
        self._kernels["o"].launch((blocks,), *arguments, self.rows, matrix.rows)

    def router(
        self,
        weight: Tensor,
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        normed: Tensor | None,
        places: Tensor,
        routing: Routing,
    ) -> None:
        """Choice of experts; with one row `x` is the residual stream and `normed` takes it normalised for `gate_up`."""
        r = routing
        self._kernels["router"].launch(
            (-(-self.shape.experts // 16), self._router_parts),
            weight, x, norm_weight, eps, normed, places, r.logits, r.done, r.experts, r.weights, r.places, r.active,
            r.slots, r.counts, self.rows,
        )  # fmt: skip

    def gate_up(self, matrix: Matrix, x: Tensor, routing: Routing, out: Tensor) -> None:
        """SiLU(gate) * up of every slot, ``[rows * top_k, inner]`` by place."""
        r, packed = routing, (matrix.weights, matrix.scales, matrix.factors)
        if self.is_single:
            blocks = -(-self.shape.inner // (8 * self.tuning.gate_up_units)) if matrix.is_fp4 else self.shape.inner // 8
            self._kernels["gate_up"].launch((blocks, self.shape.top_k), *packed, r.logits, x, out)
        else:
            self._kernels["gate_up"].launch((self._up_blocks,), *packed, r.counts, r.active, r.slots, x, out)

    def down(self, matrix: Matrix, x: Tensor, routing: Routing, out: Tensor) -> None:
        """Down projection of every slot, ``[rows * top_k, hidden]`` by slot.

        With one row `out` is the residual stream ``[1, hidden]``, to which the weighted sum of the slots is added.
        """
        r, packed = routing, (matrix.weights, matrix.scales, matrix.factors)
        if self.is_single:
            self._kernels["down"].launch((self.shape.hidden // 16,), *packed, r.logits, x, out)
        else:
            self._kernels["down"].launch((self._down_blocks,), *packed, r.counts, r.active, r.slots, x, out)


def _split(columns: int, prefer: int, most_warps: int = 16) -> tuple[int, int]:
    found = split_columns(columns, most_warps=most_warps, prefer_chunks=prefer)
    if found is None:
        raise ValueError(f"{columns} columns cannot be shared equally")
    return found


def _ring(columns: int, most: int) -> tuple[int, int]:
    """Chunks that a streaming warp has under way, and how many of them have their scales loaded together."""
    chunks = columns // 128
    ring = next(n for n in range(most, 0, -1) if chunks % n == 0)
    return ring, next(n for n in (4, 2, 1) if ring % n == 0)


def _slot_split(shape: DecoderShape) -> tuple[int, int]:
    """Warps that share a slot's row, and chunks of each; a block has 512 threads at most."""
    chunks = shape.inner // 128
    for warps in range(max(1, 16 // shape.top_k), 0, -1):
        if chunks % warps == 0:
            return warps, chunks // warps
    raise AssertionError
