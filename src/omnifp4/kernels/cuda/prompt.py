"""The small kernels that a prompt needs between its matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from omnifp4.kernels.cuda.launching import load_kernels, wanted
from omnifp4.kernels.cuda.shapes import PAGE, DecoderShape


class PromptKernels:
    """For one model's shape and any number of tokens."""

    def __init__(self, shape: DecoderShape, device: torch.device) -> None:
        """Compiles them."""
        heads = {
            "FP4": 0, "HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "HEAD_DIM": shape.head_dim, "PAGE": PAGE,
            "WARPS": 4, "SPLITS": 1, "MIN_STRETCH": PAGE, "QK_NORM": int(shape.qk_norm),
        }  # fmt: skip
        kernels = {
            "norm": wanted("norm.cu", "rms_norm", 256, TOPK=0, HIDDEN=shape.hidden, THREADS=256),
            "place_heads": wanted("attention.cu", "place_heads", 128, **heads),
        }
        # Other libraries' kernels stand between these, so an early start gains nothing.
        self._kernels = load_kernels(kernels, device, dependent=False)

    def norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """RMSNorm of BF16 ``[tokens, hidden]``, contiguous."""
        self._kernels["norm"].launch((len(x),), x, None, None, None, weight, eps, out, None)

    def place_heads(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor],
        eps: float,
        rotary: tuple[Tensor, Tensor],
        table: Tensor,
        cache: tuple[Tensor, Tensor],
    ) -> None:
        """Norm and rotary embedding of queries and keys in place; keys and values into the cache.

        Args:
            qkv: BF16 ``[tokens, (heads + 2 kv_heads) * head_dim]``, contiguous.
            norms: of queries and keys, ``[head_dim]``.
            eps: of these norms.
            rotary: cosines and sines BF16 ``[tokens, head_dim / 2]``.
            table: int32, pages of the slot in order.
            cache: keys and values ``[pages, kv_heads, PAGE, head_dim]`` of the layer.
        """
        self._kernels["place_heads"].launch((len(qkv),), qkv, *norms, eps, *rotary, table, *cache, 0)
