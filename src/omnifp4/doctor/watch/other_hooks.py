"""Notes what is asked of vLLM, and how ModelOpt's calibration went."""

from __future__ import annotations

import functools
from typing import Any

from .log import Log
from .model_hooks import last_structure, shown


def hook_vllm(module: Any, log: Log) -> None:
    """``vllm`` and the module of its ``LLM``: the arguments of each engine, and what it said to them."""
    engine = vars(module).get("LLM")
    if not isinstance(engine, type) or getattr(engine, "_watched", False):
        return
    original = engine.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {"model": args[0], **kwargs} if args else kwargs
        log.event("vllm", arguments=shown(given), path=str(given.get("model", "")))
        try:
            original(self, *args, **kwargs)
        except Exception as error:
            log.threw("vllm", "LLM", error)
            raise

    engine.__init__ = init  # type: ignore[misc]
    engine._watched = True  # type: ignore[attr-defined]


def hook_modelopt(module: Any, log: Log) -> None:
    """``modelopt.torch.quantization``: ``quantize`` and its forward loop."""
    original = vars(module).get("quantize")
    if original is None or getattr(original, "_watched", False):
        return

    @functools.wraps(original)
    def quantize(model: Any, config: Any, forward_loop: Any = None, **kwargs: Any) -> Any:
        before = _counts(log)

        def loop(*args: Any, **given: Any) -> Any:
            try:
                return forward_loop(*args, **given)
            except Exception as error:
                log.threw("calibration", getattr(forward_loop, "__name__", "forward_loop"), error)
                raise

        try:
            result = original(model, config, loop if forward_loop is not None else None, **kwargs)
        finally:
            calls, failed = (now - then for now, then in zip(_counts(log), before, strict=True))
            log.event(
                "calibration", calls=calls, failed=failed, has_loop=forward_loop is not None, model=type(model).__name__
            )
        last_structure(log)
        return result

    quantize._watched = True  # type: ignore[attr-defined]
    module.quantize = quantize


def _counts(log: Log) -> tuple[int, int]:
    return sum(row[0] for row in log.calls.values()), sum(row[1] for row in log.calls.values())
