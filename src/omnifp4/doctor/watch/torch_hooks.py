"""Counts ``torch.cat``, and notes where it was given an empty list."""

from __future__ import annotations

import sys
from typing import Any

from .log import Log, place_of


def hook_torch(torch: Any, log: Log) -> None:
    """Put a counting function in place of ``torch.cat``."""
    log.event("torch", version=str(torch.__version__), cuda=torch.version.cuda)
    original = torch.cat
    is_compiling = torch.compiler.is_compiling

    def cat(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return original(*args, **kwargs)
        log.cat_calls += 1
        tensors = args[0] if args else kwargs.get("tensors")
        if isinstance(tensors, (list, tuple)) and not tensors:
            log.cat_empty += 1
            log.cat_place = place_of(sys._getframe(1))
            log.event("empty-cat", place=log.cat_place)
        return original(*args, **kwargs)

    cat.__doc__ = original.__doc__
    torch.cat = cat
    # TorchScript knows its operators by identity.
    torch.jit._builtins._register_builtin(cat, "aten::cat")
