"""Runs a script as ``python SCRIPT`` would, with the hooks in place."""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import sys
import threading
import traceback
from types import TracebackType

from . import model_hooks, other_hooks, torch_hooks
from .imports import Hook, watch_imports
from .log import Log, is_ours

HOOKS: dict[str, Hook] = {
    "torch": torch_hooks.hook_torch,
    "transformers.modeling_utils": model_hooks.hook_base,
    "transformers.models.auto.auto_factory": model_hooks.hook_auto_models,
    "transformers.models.auto.tokenization_auto": model_hooks.hook_auto_tokenizer,
    "transformers.models.auto.processing_auto": model_hooks.hook_auto_processor,
    "transformers.tokenization_utils_base": model_hooks.hook_tokenizers,
    "transformers.processing_utils": model_hooks.hook_processors,
    "transformers.generation.utils": model_hooks.hook_generation,
    "transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe": model_hooks.hook_omni,
    "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni": model_hooks.hook_omni,
    "vllm": other_hooks.hook_vllm,
    "vllm.entrypoints.llm": other_hooks.hook_vllm,
    "modelopt.torch.quantization": other_hooks.hook_modelopt,
}


def main(log_path: str, stack_path: str, script: str, arguments: list[str]) -> None:
    """Run the script and leave with its exit status."""
    log = Log(log_path)
    stacks = open(stack_path, "w")  # noqa: SIM115, PTH123
    faulthandler.enable(file=stacks, all_threads=True)
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True, chain=False)
    watch_imports(HOOKS, log)
    log.start_beating()
    threading.excepthook = _of_threads(log)
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # noqa: PTH100, PTH120
    log.event("start", script=script, python=sys.version.split()[0])
    status = 1
    scope = None
    try:
        scope = runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            sys.stderr.write(stop.code + "\n")
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        log.threw("script", os.path.basename(script), error)  # noqa: PTH119
        error.__traceback__ = without_ours(error.__traceback__)
        traceback.print_exception(error)
    finally:
        model_hooks.last_structure(log)
        log.beat()
        log.event("end", status=status)
    del scope
    sys.stdout.flush()
    sys.exit(status)


def without_ours(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the script's first frame on."""
    while trace is not None and is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _of_threads(log: Log):  # type: ignore[no-untyped-def]
    before = threading.excepthook

    def hook(told: threading.ExceptHookArgs) -> None:
        if told.exc_value is not None:
            log.threw("thread", told.thread.name if told.thread else "", told.exc_value)
        before(told)

    return hook
