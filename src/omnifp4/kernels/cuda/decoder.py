"""The kernels of one decode step, compiled for a model's shape and a number of rows.

Every method enqueues one kernel on torch's current stream. Activations are BF16; see the sources for the arithmetic.
"FP4 order" is the order of activations that FP4 weights ask for: `omnifp4.kernels.decode_reference.in_fp4_order`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from omnifp4.kernels.cuda.decoder_plan import DecoderPlan, Processor, Tuning
from omnifp4.kernels.cuda.launching import load_kernels
from omnifp4.kernels.cuda.shapes import DecoderShape

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
        self.plan = DecoderPlan(self.shape, self.rows, self.fp4, Processor.of(self.device), self.tuning)
        self.is_single = self.plan.is_single
        self._kernels = load_kernels(self.plan.wanted, self.device, dependent=self.tuning.dependent)

    def routing_buffers(self) -> Routing:
        """What `router` fills."""
        rows, shape, slots = self.rows, self.shape, self.rows * self.shape.top_k

        def new(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        return Routing(
            logits=new(self.plan.router_parts, rows, shape.experts, dtype=torch.float32),
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
            torch.zeros((pairs, self.plan.splits, group, self.shape.head_dim), dtype=torch.float32, device=self.device),
            torch.zeros((pairs, self.plan.splits, group, 2), dtype=torch.float32, device=self.device),
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
        arguments = (matrix.weights, matrix.scales, matrix.factors, x, norm_weight, eps, None, out)
        self._kernels["qkv"].launch((self.plan.qkv_blocks,), *arguments, self.rows, matrix.rows)

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
            (self.shape.kv_heads, self.plan.splits, self.rows),
            qkv, norms[0], norms[1], eps, rotary[0], rotary[1], places, pages, pages.shape[1],
            cache[0], cache[1], splits.parts, splits.tops, splits.done, out, scale,
        )  # fmt: skip

    def o(self, matrix: Matrix, x: Tensor, residual: Tensor) -> None:
        """Output projection, added to the residual stream."""
        arguments = (matrix.weights, matrix.scales, matrix.factors, x, None, 0.0, residual, residual)
        self._kernels["o"].launch((self.plan.o_blocks,), *arguments, self.rows, matrix.rows)

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
            (-(-self.shape.experts // 16), self.plan.router_parts),
            weight, x, norm_weight, eps, normed, places, r.logits, r.done, r.experts, r.weights, r.places, r.active,
            r.slots, r.counts, self.rows,
        )  # fmt: skip

    def gate_up(self, matrix: Matrix, x: Tensor, routing: Routing, out: Tensor) -> None:
        """SiLU(gate) * up of every slot, ``[rows * top_k, inner]`` by place."""
        r, packed = routing, (matrix.weights, matrix.scales, matrix.factors)
        if self.is_single:
            self._kernels["gate_up"].launch((self.plan.gate_up_blocks, self.shape.top_k), *packed, r.logits, x, out)
        else:
            self._kernels["gate_up"].launch((self.plan.gate_up_blocks,), *packed, *_lists(r), x, out)

    def down(self, matrix: Matrix, x: Tensor, routing: Routing, out: Tensor) -> None:
        """Down projection of every slot, ``[rows * top_k, hidden]`` by slot.

        With one row `out` is the residual stream ``[1, hidden]``, to which the weighted sum of the slots is added.
        """
        r, packed = routing, (matrix.weights, matrix.scales, matrix.factors)
        if self.is_single:
            self._kernels["down"].launch((self.plan.down_blocks,), *packed, r.logits, x, out)
        else:
            self._kernels["down"].launch((self.plan.down_blocks,), *packed, *_lists(r), x, out)


def _lists(routing: Routing) -> tuple[Tensor, Tensor, int, Tensor, int]:
    return routing.counts, routing.active, len(routing.active), routing.slots, len(routing.slots)
