"""Which engine makes a model's text, and one engine for all conversations on a model."""

from __future__ import annotations

import threading
from typing import Any

from omnifp4.decoding.engine import ENGINES, DecodingError, Engine


def choose_engine(
    model: Any, requested: str = "auto", *, most_sequences: int = 1, context_tokens: int | None = None
) -> Engine:
    """Makes the fastest engine that fits model and machine, or the one asked for.

    Args:
        model: a loaded omni model.
        requested: ``auto`` or a name in `ENGINES`; what is named is never replaced by another.
        most_sequences: that must be possible at once.
        context_tokens: the most of one sequence; None leaves it to the engine, up to what the model's config allows.

    Returns:
        The engine; its `reason` says why it was chosen.

    Raises:
        DecodingError: there is no such engine, or the one asked for does not fit.
    """
    from omnifp4.decoding import graph_engine
    from omnifp4.decoding.module_engine import ModuleEngine

    if requested not in ("auto", *ENGINES):
        raise DecodingError(f"there is no engine {requested!r}", hint=f"allowed: auto, {', '.join(ENGINES)}")
    if most_sequences < 1:
        raise DecodingError(f"most_sequences is {most_sequences}", hint="a whole number from 1")
    if requested == "modules":
        return ModuleEngine(model, most_sequences=most_sequences, context_tokens=context_tokens, reason="as asked for")
    why_not = graph_engine.why_not(model, most_sequences=most_sequences, context_tokens=context_tokens)
    if not why_not:
        reason = "as asked for" if requested == "cuda-graph" else "own kernels fit this model and GPU"
        return graph_engine.GraphEngine(
            model, most_sequences=most_sequences, context_tokens=context_tokens, reason=reason
        )
    if requested == "cuda-graph":
        raise DecodingError(f"the engine cuda-graph cannot run this model: {why_not}", hint="--engine modules")
    return ModuleEngine(
        model, most_sequences=most_sequences, context_tokens=context_tokens, reason=f"no CUDA graph: {why_not}"
    )


class _Shared:
    """The engines of one model, kept on it: they go when it goes. Copies and pickles of the model start without."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engines: list[Engine] = []

    def __reduce__(self) -> tuple[type[_Shared], tuple[()]]:
        return _Shared, ()


_sharing = threading.Lock()


def shared_engine(model: Any, requested: str = "auto", *, context_tokens: int | None = None) -> Engine:
    """The one engine that all conversations on a model use, so that a GPU's cache is taken once.

    Args:
        model: as in `choose_engine`.
        requested: as in `choose_engine`; ``auto`` takes what there is already.
        context_tokens: as in `choose_engine`; an engine that is there already must offer as many.

    Raises:
        DecodingError: as `choose_engine`; or the engine that is there has a smaller context.
    """
    with _sharing:
        shared: _Shared = vars(model).setdefault("_omnifp4_engines", _Shared())
    with shared.lock:
        for engine in shared.engines:
            if requested in ("auto", engine.name):
                if context_tokens is not None and context_tokens > engine.context_tokens:
                    raise DecodingError(
                        f"context_tokens is {context_tokens}, but this model's engine {engine.name} was made for "
                        f"{engine.context_tokens}",
                        hint="engine=choose_engine(model, context_tokens=…)",
                    )
                return engine
        engine = choose_engine(model, requested, context_tokens=context_tokens)
        shared.engines.append(engine)
        return engine
