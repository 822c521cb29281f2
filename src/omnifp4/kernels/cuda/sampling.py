"""Drawing of the next tokens on the device."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from omnifp4.kernels.cuda.launching import Kernel, load_kernels, wanted

BLOCKS: Final = 32
"""Blocks that share the logits of a row."""
TOP_CANDIDATES: Final = 256


class SamplingKernels:
    """From logits to tokens, for a vocabulary."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        """`vocabulary` is a multiple of 8."""
        self._vocabulary = vocabulary
        self._candidates = {"top": min(TOP_CANDIDATES, vocabulary), "all": vocabulary}
        self._kernels: dict[str, Kernel] = {}
        for draw, candidates in {"greatest": 1, **self._candidates}.items():
            names = ("greatest", "take") if draw == "greatest" else ("draw",)
            threads = {"greatest": 256, "take": 32, "draw": 1024}
            sizes = {"VOCABULARY": vocabulary, "BLOCKS": BLOCKS, "CANDIDATES": candidates}
            kernels = {name: wanted("sampling.cu", name, threads[name], **sizes) for name in names}
            for name, kernel in load_kernels(kernels, device).items():
                self._kernels[name if draw == "greatest" else draw] = kernel

    def next_tokens(self, logits: Tensor, rows: Tensor, state: Any, recent: Tensor, draw: str, penalty: bool) -> None:
        """Draw a token for each row that is not idle, and set its slot for the next step.

        Args:
            logits: BF16 ``[rows, vocabulary]``, contiguous.
            rows: int32 ``[rows]``, slot of each row; below 0: idle.
            state: `omnifp4.decoding.step_graph.SlotState`.
            recent: int32 ``[rows]``, takes the tokens; -1 where the logits are not numbers.
            draw: ``greatest``, ``top`` or ``all``.
            penalty: apply the slots' repetition penalties, as Transformers does.
        """
        count = len(rows)
        after = (state.tokens, state.lengths, state.made, recent, state.seen)
        if draw == "greatest" and not penalty:
            found = torch.empty((count, BLOCKS), dtype=torch.int64, device=logits.device)
            self._kernels["greatest"].launch((BLOCKS, count), logits, rows, found)
            self._kernels["take"].launch((count,), found, rows, *after)
            return
        values = logits.float()
        if penalty:
            slots = rows.clamp(min=0).long()
            factor = state.penalties[slots, None]
            lowered = torch.where(values > 0, values / factor, values * factor)
            values = torch.where(state.seen[slots] > 0, lowered, values)
        draw = "top" if draw == "greatest" else draw
        if draw == "top":
            candidates, indices = torch.topk(values, self._candidates[draw], dim=-1)
        else:
            candidates, indices = values.sort(-1, descending=True)
        self._kernels[draw].launch(
            (count,),
            candidates.contiguous(),
            indices.contiguous(),
            rows,
            state.temperatures,
            state.top_ks,
            state.top_ps,
            state.seeds,
            *after,
        )
