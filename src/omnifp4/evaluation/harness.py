"""Tasks of lm-eval on a model loaded here, or on an OpenAI-compatible server such as vLLM's.

lm-eval asks two things of a model: log-probabilities of given text, and text. Its own class for Transformers models asks
both of what `omnifp4.load` gives: of an omni model, its thinker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.base import Verdict, as_text, this_environment
from omnifp4.receipt.evaluation import Gate, HarnessReceipt, HarnessResult

ACCURACIES: Final = ("acc", "exact_match")
"""Metrics, before their filter, that ``--min-accuracy`` applies to."""


def run_harness(
    model: str,
    tasks: Sequence[str],
    *,
    server: str | None = None,
    server_model: str | None = None,
    chat: bool = False,
    task_folder: Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "bfloat16",
    seed: int = 0,
    min_accuracy: float | None = None,
) -> HarnessReceipt:
    """Run tasks of lm-eval.

    Args:
        model: checkpoint folder or Hub id; with `server`, of its tokenizer.
        tasks: names in lm-eval, of its registry or of `task_folder`.
        server: base address of an OpenAI-compatible server, such as ``http://localhost:8000``; None loads the model here.
        server_model: the model's name there; None takes `model`.
        chat: use the server's chat endpoint, which makes text only and gives no log-probabilities of given text.
        task_folder: folder of task files of your own.
        limit: documents of each task; None for all.
        few_shot: examples before each question; None as the task says.
        batch_size: sequences at once.
        device: ``auto``, ``cpu``, ``cuda`` …; for a model loaded here.
        dtype: likewise.
        seed: of lm-eval's random numbers.
        min_accuracy: of every accuracy; see `ACCURACIES`.

    Raises:
        OmniFP4Error: lm-eval is not installed, a task is unknown, or the server cannot be used.
    """
    begin = time.monotonic()
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise OmniFP4Error(f"--min-accuracy is {min_accuracy}", hint="allowed: 0 to 1")
    if find_spec("lm_eval") is None:
        raise OmniFP4Error("lm-eval is not installed", hint="pip install 'omnifp4[lm-eval]'")
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    known = manager.match_tasks(list(tasks))
    if missing := [task for task in tasks if not manager.match_tasks([task])]:
        raise OmniFP4Error(f"lm-eval has no task {missing[0]!r}", hint="lm-eval ls tasks lists them")
    if server is None:
        subject = _loaded(model, device, dtype, batch_size)
    else:
        subject = _served(model, server, server_model or model, chat, batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=subject, tasks=known, num_fewshot=few_shot, limit=limit, task_manager=manager, random_seed=seed,
            numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed, log_samples=False,
            apply_chat_template=chat,
        )  # fmt: skip
    except (ConnectionError, TimeoutError, NotImplementedError) as error:
        raise OmniFP4Error(
            f"lm-eval could not finish: {str(error)[:300] or type(error).__name__}",
            hint="is the server there, and does it give log-probabilities of the prompt (echo with logprobs)?"
            if server is not None
            else "choose tasks that this model can answer",
        ) from error
    if found is None:
        raise OmniFP4Error("lm-eval gave no results", hint="in a run of several processes, ask the first")
    results = tuple(_results(found))
    gates = _gates(results, min_accuracy)
    failed = any(gate.verdict is Verdict.FAIL for gate in gates)
    return HarnessReceipt(
        model=as_text(str(model)), server=server, harness=str(getattr(lm_eval, "__version__", "unknown")),
        tasks=tuple(known), limit=limit, results=results, gates=gates,
        verdict=Verdict.FAIL if failed else Verdict.PASS if gates else Verdict.NOT_CHECKED,
        seconds=time.monotonic() - begin, environment=this_environment(),
    )  # fmt: skip


def _loaded(model: str, device: str, dtype: str, batch_size: int) -> Any:
    """lm-eval's class for Transformers models around one that is loaded here."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.checkpoint.hub import local_folder
    from omnifp4.runtime import load

    folder = local_folder(model)
    config = open_checkpoint(folder).config
    omni = "thinker_config" in config
    loaded = load(folder, device=device, dtype=dtype, speech=not omni)
    text = loaded.thinker if omni else loaded
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or "<|endoftext|>"
    return HFLM(pretrained=text, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def _served(model: str, server: str, name: str, chat: bool, batch_size: int) -> Any:
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    base = server.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise OmniFP4Error(f"server is {server!r}", hint="an address such as http://localhost:8000")
    os.environ.setdefault("OPENAI_API_KEY", "none")
    if chat:
        return LocalChatCompletion(
            base_url=f"{base}/v1/chat/completions", model=name, tokenizer_backend=None, batch_size=1, max_retries=1
        )
    return LocalCompletionsAPI(
        base_url=f"{base}/v1/completions", model=name, tokenizer_backend="huggingface", tokenizer=model,
        batch_size=batch_size, max_retries=1,
    )  # fmt: skip


def _results(found: Mapping[str, Any]) -> Iterator[HarnessResult]:
    for task, metrics in found["results"].items():
        counts = found.get("n-samples", {}).get(task, {})
        directions = found.get("higher_is_better", {}).get(task, {})
        for metric, value in metrics.items():
            name, _, chosen = metric.partition(",")
            if not chosen or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{chosen}")
            yield HarnessResult(
                task=task, metric=metric, value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                samples=counts.get("effective"), higher_is_better=directions.get(name),
            )  # fmt: skip


def _gates(results: Sequence[HarnessResult], least: float | None) -> tuple[Gate, ...]:
    if least is None:
        return ()
    chosen = [one for one in results if one.metric.partition(",")[0] in ACCURACIES]
    if not chosen:
        raise OmniFP4Error("--min-accuracy has nothing to judge", hint=f"no task gives {' or '.join(ACCURACIES)}")
    worst = min(chosen, key=lambda one: one.value)
    verdict = Verdict.PASS if worst.value >= least - 1e-12 else Verdict.FAIL
    return (Gate(option="--min-accuracy", limit=least, value=worst.value, where=worst.task, verdict=verdict),)
