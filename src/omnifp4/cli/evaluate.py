"""omnifp4 evaluate"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from omnifp4.cli import options
from omnifp4.cli.output import Output, check_receipt
from omnifp4.cli.talk import hush_libraries
from omnifp4.errors import OmniFP4Error

SENSITIVITY_SAMPLES: Final = 2
"""Of each task, where --samples is not given: every layer is run over all of them."""


SHARED: Final = frozenset({"models", "receipt", "as_json", "device", "dtype", "seed"})
FOR_LM_EVAL: Final = SHARED | {
    "lm_eval", "against", "server", "server_model", "chat", "few_shot", "task_folder", "limit", "min_accuracy",
}  # fmt: skip
FOR_SENSITIVITY: Final = SHARED | {"sensitivity", "each_expert", "against", "data", "samples", "segmented", "cache"}
ELSEWHERE: Final = (
    (FOR_LM_EVAL | FOR_SENSITIVITY) - SHARED - {"against", "data", "samples", "segmented", "cache", "min_accuracy"}
)
"""Options that a comparison of logits has no use for."""


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A checkpoint folder or a Hub id; several are compared, sample by sample, each with the first.",
        ),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="REFERENCE", help="The wide checkpoint that MODEL was made from.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of several: the one that the others are compared with.")
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="FILE", help="JSONL of conversations with media paths; or the bundled samples.")
    ] = "bundled",
    samples: Annotated[int | None, typer.Option(metavar="N", help="Only the first N of each task.")] = None,
    segmented: Annotated[
        bool, typer.Option("--segmented", help="Run the reference layer by layer from disk: it need not fit in memory.")
    ] = False,
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="Compare hidden states of the first N layers, and stop there.")
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Tell where FP4 hurts: errors by layer and expert, and what each layer costs alone; with --segmented "
            "errors alone, from disk.",
        ),
    ] = False,
    each_expert: Annotated[
        bool,
        typer.Option("--each-expert", help="With --sensitivity: what each expert costs alone too; a run for each."),
    ] = False,
    speech: Annotated[bool, typer.Option(help="Judge speech too, where both sides have a talker.")] = True,
    floor: Annotated[bool, typer.Option(help="Run the reference twice, for the noise floor.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32, of both sides.")] = "bfloat16",
    cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the reference's results are kept between runs.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the confidence intervals.")] = 0,
    max_kl: Annotated[float | None, typer.Option(help="Limit of the mean KL divergence in any modality, nats.")] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Limit of the top-1 agreement in any modality, 0 to 1.")
    ] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="Limit of the perplexity ratio in any modality.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Limit of right answers in any task, 0 to 1.")] = None,
    max_accuracy_loss: Annotated[
        float | None, typer.Option(help="Limit of right answers lost against the reference in any task, 0 to 1.")
    ] = None,
    min_code_agreement: Annotated[
        float | None, typer.Option(help="Limit of equal speech codes, free-running, 0 to 1.")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", metavar="TASKS", help="Run these tasks of lm-eval, separated by commas.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="With --lm-eval: ask this OpenAI-compatible server.")
    ] = None,
    server_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --server: the model's name there.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="With --lm-eval: ask in the chat template; on a server, at its chat endpoint."),
    ] = False,
    few_shot: Annotated[
        int | None, typer.Option(metavar="N", help="With --lm-eval: examples before each question.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --lm-eval: task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="With --lm-eval: documents of each task.")] = None,
    receipt: Annotated[
        Path | None, typer.Option("--receipt", metavar="FILE", help="Write the record here too.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Tell what a model loses against its reference, by modality; of several, which is worth it.

    Exit status 1 if a limit is broken.
    """
    from omnifp4.receipt.base import Verdict
    from omnifp4.report.evaluation import evaluation_text, harness_text

    model = models[0]
    output = Output(as_json=as_json)
    check_receipt(receipt)
    if segmented or layers is not None:
        # Read when torch is imported. Threads of the arithmetic that spin while they wait take the cores from those that
        # read ahead: on two cores that halves the speed.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    hush_libraries()
    if lm_eval is not None:
        from omnifp4.evaluation import run_harness

        _refuse(context, FOR_LM_EVAL, "is not for --lm-eval")
        if against is not None:
            raise OmniFP4Error("--lm-eval judges one model", hint="leave --against out, and run it once for each")
        _refuse_several(models, "--lm-eval")
        tasks = [task.strip() for task in lm_eval.split(",") if task.strip()]
        harness = run_harness(
            model, tasks, server=server, server_model=server_model, chat=chat, task_folder=task_folder,
            limit=limit, few_shot=few_shot, device=device, dtype=dtype, seed=seed, min_accuracy=min_accuracy,
        )  # fmt: skip
        _write(receipt, harness.model_dump_json(indent=2))
        output.result(harness, harness_text(harness))
        if harness.verdict is Verdict.FAIL:
            raise typer.Exit(1)
        return
    if sensitivity:
        _refuse(context, FOR_SENSITIVITY, "is not for --sensitivity")
        _refuse_several(models, "--sensitivity")
        if against is None:
            raise OmniFP4Error(
                "--sensitivity needs --against REFERENCE", hint="the wide checkpoint MODEL was made from"
            )
        from omnifp4.api import sensitivity as draw
        from omnifp4.report.sensitivity import sensitivity_text

        with output.steps("sensitivity") as steps:
            drawn = draw(
                model, against=against, data=data, samples=samples or SENSITIVITY_SAMPLES, alone=not segmented,
                experts=each_expert, device=device, dtype=dtype, cache=cache, seed=seed, progress=steps,
            )  # fmt: skip
        _write(receipt, drawn.model_dump_json(indent=2))
        output.result(drawn, sensitivity_text(drawn))
        return
    if against is None:
        raise OmniFP4Error("evaluate needs --against REFERENCE, or --lm-eval TASKS")
    every = frozenset(parameter.name or "" for parameter in context.command.params)
    _refuse(context, every - ELSEWHERE, "is for --lm-eval or --sensitivity")
    if len(models) > 1:
        if layers is not None:
            raise OmniFP4Error("--layers compares hidden states of one model", hint="give one MODEL, or leave it out")
        from omnifp4.api import compare
        from omnifp4.report.comparison import comparison_text

        with output.steps("compare") as steps:
            compared = compare(
                models, against=against, baseline=baseline, data=data, samples=samples, segmented=segmented, speech=speech,
                floor=floor, device=device, dtype=dtype, cache=cache, seed=seed, max_kl=max_kl, min_top1=min_top1,
                max_ppl_ratio=max_ppl_ratio, min_accuracy=min_accuracy, max_accuracy_loss=max_accuracy_loss,
                min_code_agreement=min_code_agreement, progress=steps,
            )  # fmt: skip
        _write(receipt, compared.model_dump_json(indent=2))
        output.result(compared, comparison_text(compared))
        if compared.verdict is Verdict.FAIL:
            raise typer.Exit(1)
        return
    if baseline is not None:
        raise OmniFP4Error(
            "--baseline is for several models", hint="name them all: omnifp4 evaluate A B --against MODEL"
        )
    from omnifp4.api import evaluate as run

    with output.steps("evaluate") as steps:
        found = run(
            model, against=against, data=data, samples=samples, segmented=segmented, layers=layers, speech=speech,
            floor=floor, device=device, dtype=dtype, cache=cache, seed=seed, max_kl=max_kl, min_top1=min_top1,
            max_ppl_ratio=max_ppl_ratio, min_accuracy=min_accuracy, max_accuracy_loss=max_accuracy_loss,
            min_code_agreement=min_code_agreement, progress=steps,
        )  # fmt: skip
    _write(receipt, found.model_dump_json(indent=2))
    output.result(found, evaluation_text(found))
    if found.verdict is Verdict.FAIL:
        raise typer.Exit(1)


def _refuse(context: typer.Context, allowed: frozenset[str], why: str) -> None:
    """An option that would be ignored is refused: a limit that never judges looks like one that was met."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in allowed and source is not None and source.name == "COMMANDLINE":
            raise OmniFP4Error(f"{parameter.opts[0]} {why}", hint="leave one of them out")


def _refuse_several(models: list[str], option: str) -> None:
    if len(models) > 1:
        raise OmniFP4Error(f"{option} judges one model, not {len(models)}", hint="run it once for each")


def _write(path: Path | None, text: str) -> None:
    from omnifp4.checkpoint.output import write_text
    from omnifp4.errors import OutputError

    if path is None:
        return
    try:
        write_text(path, text + "\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
