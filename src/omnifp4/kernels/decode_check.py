"""One layer of a decode step on random inputs, every kernel judged by `decode_reference`: for tests and benchmarks.

Outputs begin as NaN, so that what a kernel leaves out shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from omnifp4.kernels import decode_reference as reference
from omnifp4.kernels.cuda.decoder import CODE_FACTOR, DecoderKernels, Matrix
from omnifp4.kernels.cuda.decoder_plan import Tuning
from omnifp4.kernels.cuda.shapes import PAGE, DecoderShape

EPS: Final = 1e-6
BOUND: Final = 5e-3
"""Relative error (norm of the difference over norm of the reference) that rounding to BF16 may make."""
EXACT: Final = frozenset({"router choice", "router list", "cache", "idle rows"})
"""Judgements that must be 0."""


@dataclass(frozen=True)
class Forms:
    """Which matrices are FP4; others are BF16."""

    attention: bool = True
    experts: bool = True


def random_matrix(*shape: int, device: torch.device, fp4: bool = True) -> Matrix:
    """Codes uniform, scales around 1, weights with a spread of about 0.02."""
    *lead, rows, columns = shape
    if not fp4:
        return Matrix((torch.randn(*lead, rows, columns, device=device) * 0.02).bfloat16())
    codes = torch.randint(0, 256, (*lead, rows, columns // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(0x30, 0x40, (*lead, rows, columns // 16), dtype=torch.uint8, device=device)
    count = lead[0] if lead else rows // 16
    factors = torch.full((count,), CODE_FACTOR / 160, device=device) * (0.5 + torch.rand(count, device=device))
    return Matrix(codes, scales, factors)


class LayerWeights:
    """Random weights of a layer, and a cache of random content."""

    def __init__(self, shape: DecoderShape, pages: int, device: torch.device, forms: Forms | None = None) -> None:
        forms = forms or Forms()
        self.qkv = random_matrix(shape.qkv, shape.hidden, device=device, fp4=forms.attention)
        self.o = random_matrix(shape.hidden, shape.heads * shape.head_dim, device=device, fp4=forms.attention)
        self.gate_up = random_matrix(shape.experts, 2 * shape.inner, shape.hidden, device=device, fp4=forms.experts)
        self.down = random_matrix(shape.experts, shape.hidden, shape.inner, device=device, fp4=forms.experts)
        self.router = (torch.randn(shape.experts, shape.hidden, device=device) * 0.02).bfloat16()
        widths = (shape.hidden, shape.hidden, shape.head_dim, shape.head_dim)
        self.norms = [(1 + 0.1 * torch.randn(n, device=device)).bfloat16() for n in widths]
        keys, values = (
            torch.randn(pages, shape.kv_heads, PAGE, shape.head_dim, device=device).bfloat16() for _ in range(2)
        )
        self.cache: tuple[Tensor, Tensor] = (keys, values)


class LayerStep:
    """Buffers of a step and its kernels.

    Rows have contexts of different lengths, and rotary positions that are not their lengths.
    """

    def __init__(
        self,
        shape: DecoderShape,
        rows: int,
        device: torch.device,
        *,
        tuning: Tuning | None = None,
        context: int = 192,
        forms: Forms | None = None,
    ) -> None:
        forms = forms or Forms()
        self.shape, self.rows, self.device, self.forms = shape, rows, device, forms
        fp4 = {"qkv": forms.attention, "o": forms.attention, "experts": forms.experts}
        self.kernels = DecoderKernels(shape, rows, device, fp4, tuning or Tuning())

        def new(*size: int) -> Tensor:
            return torch.full(size, float("nan"), dtype=torch.bfloat16, device=device)

        self.residual = torch.randn(rows, shape.hidden, device=device).bfloat16()
        self.normed, self.natural = new(rows, shape.hidden), new(rows, shape.hidden)
        self.qkv, self.heads = new(rows, shape.qkv), new(rows, shape.heads * shape.head_dim)
        self.inner, self.outer = new(rows * shape.top_k, shape.inner), new(rows * shape.top_k, shape.hidden)
        self.routing = self.kernels.routing_buffers()
        self.splits = self.kernels.split_buffers()
        self.pages_per_slot = pages_per_slot(context)
        lengths = [max(0, context - 37 * row) for row in range(rows)]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        slots = torch.arange(rows, dtype=torch.int32, device=device)
        shifts = (self.lengths > 0).int() * 3
        self.places = torch.stack([slots, self.lengths, self.lengths + shifts, slots * 0], dim=1).contiguous()
        self.pages = torch.randperm(rows * self.pages_per_slot, device=device).int().view(rows, self.pages_per_slot)
        half = torch.arange(shape.head_dim // 2, device=device) / (shape.head_dim // 2)
        angles = torch.arange(self.pages_per_slot * PAGE + 8, device=device)[:, None] * 1e6**-half
        self.rotary = (angles.cos().bfloat16(), angles.sin().bfloat16())

    def natural_order(self, x: Tensor, *, fp4: bool) -> Tensor:
        """Activations that were written for a matrix."""
        return reference.in_natural_order(x) if fp4 else x

    def run_first_norm(self, layer: LayerWeights) -> None:
        """The norm ahead of the first layer; with one row the projections do it."""
        if self.rows > 1:
            self._norm(layer.norms[0], self.forms.attention)

    def run_qkv(self, layer: LayerWeights) -> None:
        if self.rows == 1:
            self.kernels.qkv(layer.qkv, self.residual, layer.norms[0], EPS, self.qkv)
        else:
            self.kernels.qkv(layer.qkv, self.normed, None, EPS, self.qkv)

    def run_attention(self, layer: LayerWeights) -> None:
        self.kernels.attention(
            self.qkv, (layer.norms[2], layer.norms[3]), EPS, self.rotary, self.places,
            self.pages, layer.cache, self.splits, self.heads,
        )  # fmt: skip

    def run_o(self, layer: LayerWeights) -> None:
        self.kernels.o(layer.o, self.heads, self.residual)

    def run_norm(self, layer: LayerWeights) -> None:
        if self.rows > 1:
            self._norm(layer.norms[1], self.forms.experts, natural=True)

    def run_router(self, layer: LayerWeights) -> None:
        if self.rows == 1:
            self.kernels.router(
                layer.router, self.residual, layer.norms[1], EPS, self.normed, self.places, self.routing
            )
        else:
            self.kernels.router(layer.router, self.natural, None, EPS, None, self.places, self.routing)

    def run_gate_up(self, layer: LayerWeights) -> None:
        self.kernels.gate_up(layer.gate_up, self.normed, self.routing, self.inner)

    def run_down(self, layer: LayerWeights) -> None:
        out = self.residual if self.rows == 1 else self.outer
        self.kernels.down(layer.down, self.inner, self.routing, out)

    def run_add(self, layer: LayerWeights) -> None:
        if self.rows > 1:
            self._norm(layer.norms[0], self.forms.attention, add=True)

    def run(self, layer: LayerWeights) -> None:
        """The whole layer."""
        for part in (
            self.run_qkv, self.run_attention, self.run_o, self.run_norm, self.run_router, self.run_gate_up,
            self.run_down, self.run_add,
        ):  # fmt: skip
            part(layer)

    def _norm(self, weight: Tensor, fp4: bool, *, natural: bool = False, add: bool = False) -> None:
        """To `normed` in the order of the next matrix, and to `natural`."""
        self.kernels.norm(
            self.residual,
            weight,
            EPS,
            natural=self.natural if natural or not fp4 else None,
            fp4_order=self.normed if fp4 else None,
            add=(self.outer, self.routing) if add else None,
        )
        if not fp4:
            self.normed.copy_(self.natural)


def pages_per_slot(context: int) -> int:
    """Pages that hold a context and a new token, with one to spare."""
    return context // PAGE + 2


def apart(got: Tensor, want: Tensor) -> float:
    """Relative error; infinite where something is not a number."""
    got, want = got.double(), want.double()
    error = ((got - want).norm() / want.norm()).item()
    return error if error == error else float("inf")


def check_layer(step: LayerStep, layer: LayerWeights) -> dict[str, float]:
    """Relative error of every kernel on the inputs that it had; 0 or 1 where the judgement is exact (`EXACT`)."""
    shape, rows, forms = step.shape, step.rows, step.forms
    errors: dict[str, float] = {}
    step.residual.normal_()
    before = step.residual.float()
    step.run_first_norm(layer)
    if rows > 1:
        normed = step.natural_order(step.normed, fp4=forms.attention)
        errors["norm"] = apart(normed, reference.norm(before, layer.norms[0], EPS))
    step.run_qkv(layer)
    x = reference.norm(before, layer.norms[0], EPS)
    errors["qkv"] = apart(step.qkv, x @ reference.weights_of(layer.qkv).T)
    held = layer.cache[0].clone(), layer.cache[1].clone()
    step.run_attention(layer)
    wanted = [
        reference.attention(
            step.qkv[r], (layer.norms[2], layer.norms[3]), EPS, step.rotary, int(step.lengths[r]), int(step.places[r, 2] - step.lengths[r]),
            step.pages[r], held, shape,
        )
        for r in range(rows)
    ]  # fmt: skip
    heads = step.natural_order(step.heads, fp4=forms.attention)
    errors["attention"] = apart(heads, torch.stack([one[0] for one in wanted]))
    keys, values = layer.cache
    errors["new keys"] = 0.0
    for r in range(rows):
        length = int(step.lengths[r])
        page, place = int(step.pages[r, length // PAGE]), length % PAGE
        # The order in which a norm adds up its squares may turn the last bit of a key.
        errors["new keys"] = max(errors["new keys"], apart(keys[page, :, place], wanted[r][1].bfloat16()))
        held[0][page, :, place], held[1][page, :, place] = keys[page, :, place], wanted[r][2].bfloat16()
    # The new token's values are there, and nothing else of the cache has changed.
    errors["cache"] = float(any(not torch.equal(a, b) for a, b in zip((keys, values), held, strict=True)))
    step.run_o(layer)
    o = reference.rounded(heads.float() @ reference.weights_of(layer.o).T)
    errors["o"] = apart(step.residual, before + o)
    after = step.residual.float()
    x = reference.norm(after, layer.norms[1], EPS)
    step.run_norm(layer)
    step.run_router(layer)
    errors["second norm"] = apart(step.natural_order(step.normed, fp4=forms.experts), x)
    logits = step.routing.logits.sum(0)
    errors["router logits"] = apart(logits, x @ layer.router.float().T)
    routed = reference.route(reference.rounded(logits), shape.top_k, shape.normalise_top_k)
    places = torch.arange(shape.top_k, device=step.device)
    if rows > 1:
        places = step.routing.places.long()
        errors["router choice"] = float((routed.experts != step.routing.experts).sum())
        errors["router weights"] = apart(step.routing.weights, routed.weights)
        errors["router list"] = float(list_is_wrong(step))
    step.run_gate_up(layer)
    inner = reference.gate_up(x, routed.experts, layer.gate_up, shape.inner)
    by_slot = step.natural_order(step.inner, fp4=forms.experts)[places].view(rows, shape.top_k, shape.inner)
    errors["gate_up"] = apart(by_slot, inner)
    outer = reference.down(by_slot.float(), routed.experts, layer.down, shape.hidden)
    summed = after + reference.rounded((outer * routed.weights[..., None]).sum(1))
    step.run_down(layer)
    if rows > 1:
        errors["down"] = apart(step.outer.view(rows, shape.top_k, -1), outer)
        step.run_add(layer)
        normed = step.natural_order(step.normed, fp4=forms.attention)
        errors["add_norm"] = apart(normed, reference.norm(step.residual.float(), layer.norms[0], EPS))
    errors["layer"] = apart(step.residual, summed)
    return errors


def list_is_wrong(step: LayerStep) -> bool:
    """Whether the router's list is not exactly the slots by expert, at most eight an entry."""
    entries, distinct = step.routing.counts.tolist()
    active = step.routing.active[:entries].tolist()
    slots, flat = step.routing.slots, step.routing.experts.flatten().tolist()
    chosen = [e for e in flat if e >= 0]
    listed = {(e, s) for e, first, count, _ in active for s in slots[first : first + count].tolist()}
    return (
        listed != {(e, slot) for slot, e in enumerate(flat) if e >= 0}
        or sum(row[2] for row in active) != len(chosen)
        or any(not 1 <= row[2] <= 8 for row in active)
        or [row[0] for row in active] != sorted(e for e in set(chosen) for _ in range(0, chosen.count(e), 8))
        or distinct != len(set(chosen))
    )


def wrong_parts(errors: dict[str, float]) -> list[str]:
    """Kernels whose error is above the bound."""
    return [name for name, error in errors.items() if not error <= (0.0 if name in EXACT else BOUND)]
