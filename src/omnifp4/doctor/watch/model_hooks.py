"""Notes loads, calls, generation, chat templates and saves of Transformers' models."""

from __future__ import annotations

import functools
import itertools
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

from .log import Log, describe
from .structure import structure_of

VALUE_LIMIT = 300
MARKED_ROLES = ("system", "user", "assistant")
MANY_ROLES = 64

_numbers = itertools.count()

alive: list[Any] = []
"""Weak references to models that were loaded."""


def hook_base(module: Any, log: Log) -> None:
    """``transformers.modeling_utils``: loading, calling, saving."""
    base = module.PreTrainedModel
    _watch_loading(base, "model", log)
    _watch_call(base, log)
    save = base.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_directory, *args, **kwargs)
        log.event("saved", folder=os.path.abspath(str(save_directory)), model=type(self).__name__)  # noqa: PTH100
        return result

    base.save_pretrained = save_pretrained


def hook_auto_models(module: Any, log: Log) -> None:
    """``transformers.models.auto.auto_factory``."""
    _watch_loading(module._BaseAutoModelClass, "model", log)


def hook_auto_tokenizer(module: Any, log: Log) -> None:
    """``transformers.models.auto.tokenization_auto``."""
    _watch_loading(module.AutoTokenizer, "tokenizer", log)


def hook_auto_processor(module: Any, log: Log) -> None:
    """``transformers.models.auto.processing_auto``."""
    _watch_loading(module.AutoProcessor, "processor", log)


def hook_tokenizers(module: Any, log: Log) -> None:
    """``transformers.tokenization_utils_base``."""
    _watch_loading(module.PreTrainedTokenizerBase, "tokenizer", log)
    _watch_template(module.PreTrainedTokenizerBase, log)


def hook_processors(module: Any, log: Log) -> None:
    """``transformers.processing_utils``."""
    _watch_loading(module.ProcessorMixin, "processor", log)
    _watch_template(module.ProcessorMixin, log)


def hook_generation(module: Any, log: Log) -> None:
    """``transformers.generation.utils``."""
    watch_generate(module.GenerationMixin, log)


def hook_omni(module: Any, log: Log) -> None:
    """The modules of omni models, which have a ``generate`` of their own."""
    for name, value in list(vars(module).items()):
        if isinstance(value, type) and name.endswith("ForConditionalGeneration"):
            watch_generate(value, log)
            if "disable_talker" in vars(value):
                _watch_disable(value, log)


def _watch_disable(owner: Any, log: Log) -> None:
    original = owner.disable_talker

    @functools.wraps(original)
    def disable_talker(self: Any) -> Any:
        log.event("talker-disabled")
        return original(self)

    owner.disable_talker = disable_talker


def _watch_loading(owner: Any, kind: str, log: Log) -> None:
    """Note the outermost ``from_pretrained``: what was asked for, and what came of it."""
    inner = owner.__dict__["from_pretrained"]
    function: Callable[..., Any] = inner.__func__

    @functools.wraps(function)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(log.local, "loading", False):
            return function(cls, *args, **kwargs)
        named = kwargs.get("pretrained_model_name_or_path", args[0] if args else "")
        path = str(named)
        log.local.loading = True
        number = next(_numbers)
        log.event(
            "load", id=number, kind=kind, loader=cls.__name__, path=_absolute(path), arguments=shown(kwargs)
        )  # fmt: skip
        begin = time.monotonic()
        try:
            result = function(cls, *args, **kwargs)
        except BaseException as error:
            log.event("load-end", id=number, seconds=time.monotonic() - begin, error=f"{type(error).__name__}: {error}")
            log.threw("load", cls.__name__, error)
            raise
        finally:
            log.local.loading = False
        made = result[0] if isinstance(result, tuple) else result
        log.event("load-end", id=number, seconds=time.monotonic() - begin, result=type(made).__name__)
        if kind == "model":
            _note_model(made, log)
        return result

    owner.from_pretrained = classmethod(from_pretrained)


def _absolute(path: str) -> str:
    return os.path.abspath(path) if os.path.isdir(path) else path  # noqa: PTH100, PTH112


def _note_model(model: Any, log: Log) -> None:
    try:
        for owner in type(model).__mro__:
            watch_generate(owner, log)
        alive.append(weakref.ref(model))
        log.event("structure", **structure_of(model))
    except Exception as error:
        log.event("hook-failed", module="structure", error=repr(error))


def last_structure(log: Log) -> None:
    """Write the structure of the models that are still there: quantization may have changed it."""
    for reference in alive:
        model = reference()
        if model is not None:
            try:
                log.event("structure", **structure_of(model))
            except Exception as error:
                log.event("hook-failed", module="structure", error=repr(error))


def _watch_call(base: Any, log: Log) -> None:
    """Count the outermost calls of models, outside of generation."""
    import torch

    original = torch.nn.Module.__call__
    is_compiling = torch.compiler.is_compiling
    local = log.local

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or getattr(local, "inside", False):
            return original(self, *args, **kwargs)
        local.inside = True
        try:
            result = original(self, *args, **kwargs)
        except Exception as error:
            log.count_call(type(self).__name__, error)
            log.threw("call", type(self).__name__, error)
            raise
        finally:
            local.inside = False
        log.count_call(type(self).__name__, None)
        return result

    base.__call__ = call


def watch_generate(owner: Any, log: Log) -> None:
    """Note the outermost ``generate``: the roles of its prompt, and what came back."""
    original = owner.__dict__.get("generate")
    if original is None or getattr(original, "_watched", False):
        return
    local = log.local

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(local, "inside", False):
            return original(self, *args, **kwargs)
        local.inside = True
        record: dict[str, Any] = {"model": type(self).__name__, "arguments": shown(kwargs), "tokens": 0, "roles": None}
        try:
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            record |= _prompt(self, ids)
        except Exception as error:
            log.event("hook-failed", module="generate", error=repr(error))
        log.event("generate-begin", **record)
        try:
            result = original(self, *args, **kwargs)
        except Exception as error:
            log.event("generate", **record, error=f"{type(error).__name__}: {error}")
            log.threw("generate", type(self).__name__, error)
            raise
        finally:
            local.inside = False
        log.event("generate", **record, result=type(result).__name__)
        return result

    generate._watched = True  # type: ignore[attr-defined]
    owner.generate = generate


def _prompt(model: Any, ids: Any) -> dict[str, Any]:
    """Length of the prompt, and its role markers where the model's config says what they are."""
    found: dict[str, Any] = {"tokens": int(ids.shape[-1]) if ids is not None else 0}
    config = model.config
    start = getattr(config, "im_start_token_id", None)
    if ids is None or not isinstance(start, int):
        return found
    names = {getattr(config, f"{role}_token_id", None): role for role in MARKED_ROLES}
    row = ids[0].tolist()
    after = [row[i + 1] if i + 1 < len(row) else -1 for i, token in enumerate(row) if token == start]
    found["roles"] = [names.get(token, str(token)) for token in after[-MANY_ROLES:]]
    found["has_talker"] = bool(getattr(model, "has_talker", False))
    return found


def _watch_template(owner: Any, log: Log) -> None:
    original = owner.apply_chat_template

    @functools.wraps(original)
    def apply_chat_template(self: Any, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, conversation, *args, **kwargs)
        except Exception as error:
            log.event("template-failed", strings=_has_string_content(conversation), **describe(error))
            log.threw("template", type(self).__name__, error)
            raise

    owner.apply_chat_template = apply_chat_template


def _has_string_content(conversation: Any) -> bool:
    try:
        return any(isinstance(message.get("content"), str) for message in conversation)
    except (AttributeError, TypeError):
        return False


def shown(kwargs: dict[str, Any]) -> dict[str, str]:
    """Arguments as short text; of tensors only their shape."""
    found = {}
    for name, value in kwargs.items():
        shape = getattr(value, "shape", None)
        text = f"{type(value).__name__}{list(shape)}" if shape is not None else repr(value)
        found[name] = text[:VALUE_LIMIT]
    return found
