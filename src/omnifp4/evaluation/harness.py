"""Tasks of lm-eval on a model loaded here, or on an OpenAI-compatible server such as vLLM's.

lm-eval asks two things of a model: log-probabilities of given text, and text. Its own class for Transformers models asks
both of what `omnifp4.load` gives: of an omni model, its thinker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from omnifp4.benchmark.server.client import Server, find_model, parse_server
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.base import Verdict, as_text, this_environment
from omnifp4.receipt.evaluation import Gate, HarnessReceipt, HarnessResult

if TYPE_CHECKING:
    import torch

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
        server_model: the model's name there; None takes the first that it lists. A key is read from ``OPENAI_API_KEY``.
        chat: put questions in the chat template, as instruction-tuned models want them; on a server, use its chat
            endpoint, which makes text only and gives no log-probabilities of given text.
        task_folder: folder of task files of your own.
        limit: documents of each task; None for all.
        few_shot: examples before each question; None as the task says.
        batch_size: sequences at once.
        device: ``auto``, ``cpu``, ``cuda`` …; for a model loaded here.
        dtype: likewise.
        seed: of lm-eval's random numbers.
        min_accuracy: of every accuracy; see `ACCURACIES`.

    Raises:
        OmniFP4Error: an argument is out of range, lm-eval is not installed, a task is unknown, or the server cannot be
            used.
    """
    begin = time.monotonic()
    if not tasks:
        raise OmniFP4Error("--lm-eval names no task", hint="lm-eval ls tasks lists them")
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise OmniFP4Error(f"--min-accuracy is {min_accuracy}", hint="allowed: 0 to 1")
    for option, value, least in (("--limit", limit, 1), ("--few-shot", few_shot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise OmniFP4Error(f"{option} is {value}", hint=f"{least} or more")
    if task_folder is not None and not task_folder.is_dir():
        raise OmniFP4Error(
            f"--task-folder {task_folder} is no folder", hint="it holds lm-eval's task files, one YAML each"
        )
    if find_spec("lm_eval") is None:
        raise OmniFP4Error("lm-eval is not installed", hint="pip install 'omnifp4[lm-eval]'")
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager, missing = None, list(tasks)
    if task_folder is not None:
        # lm-eval's own tasks are thousands of files; they are looked at only where this folder does not suffice.
        manager = TaskManager(include_path=str(task_folder), include_defaults=False)
        missing = [task for task in tasks if not manager.match_tasks([task])]
    if missing:
        manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
        if missing := [task for task in tasks if not manager.match_tasks([task])]:
            raise OmniFP4Error(f"lm-eval has no task {missing[0]!r}", hint="lm-eval ls tasks lists them")
    assert manager is not None
    known = manager.match_tasks(list(tasks))
    from omnifp4.evaluation.threads import suited_threads

    subject: Any
    if server is None:
        subject, hidden, place = _loaded(model, device, dtype, batch_size)
        quiet: Any = suited_threads(hidden, place)
    else:
        address = parse_server(server, key=os.environ.get("OPENAI_API_KEY", ""))
        first, _ = find_model(address)
        subject, quiet = _served(model, address, server_model or first, chat, batch_size), nullcontext()
    try:
        with quiet:
            found = lm_eval.simple_evaluate(
                model=subject, tasks=known, num_fewshot=few_shot, limit=limit, task_manager=manager, random_seed=seed,
                numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed, log_samples=False,
                apply_chat_template=chat,
            )  # fmt: skip
    except (OSError, NotImplementedError) as error:
        raise OmniFP4Error(f"lm-eval could not finish: {_short(error)}", hint=_hint(error, server)) from error
    except (KeyError, TypeError, IndexError) as error:
        if server is None:
            raise
        # lm-eval reads answers without asking what is in them.
        raise OmniFP4Error(
            f"lm-eval cannot read what {server} answers: {_short(error)}", hint=_hint(error, server)
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


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300].rstrip(": ")


def _hint(error: Exception, server: str | None) -> str:
    if isinstance(error, NotImplementedError):
        return "a chat endpoint gives no log-probabilities: leave --chat out, or choose tasks that are answered in text"
    if server is None:
        return "a task's data set is fetched when it is first used: is it there, or the network?"
    return "it must give log-probabilities of the prompt (echo with logprobs), as vLLM does; or use --chat"


def _loaded(model: str, device: str, dtype: str, batch_size: int) -> tuple[Any, int, torch.device]:
    """lm-eval's class for Transformers models around one that is loaded here; its width, and where it is."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.checkpoint.hub import local_folder
    from omnifp4.evaluation.devices import find_device
    from omnifp4.runtime import load

    place = find_device(device)
    folder = local_folder(model)
    omni = "thinker_config" in open_checkpoint(folder).config
    loaded = load(folder, device=place, dtype=dtype, speech=not omni, progress=False)
    text = loaded.thinker if omni else loaded
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or "<|endoftext|>"
    subject = HFLM(pretrained=text, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    return subject, int(text.get_input_embeddings().weight.shape[1]), place


def _served(model: str, server: Server, name: str, chat: bool, batch_size: int) -> Any:
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    os.environ.setdefault("OPENAI_API_KEY", "none")
    if chat:
        return LocalChatCompletion(
            base_url=f"{server.url}/v1/chat/completions",
            model=name,
            tokenizer_backend=None,
            batch_size=1,
            max_retries=1,
        )
    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model=name, tokenizer_backend="huggingface", tokenizer=model,
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
