"""Tasks of lm-eval, written here, on the loaded model and on a server: the same figures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stand_in_completions import serve

from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.evaluation import HarnessReceipt

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("tenacity", reason="lm-eval's client of servers is not installed")

SUMS = [(a, b) for a in range(1, 4) for b in range(1, 3)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks: one that compares log-probabilities, one that makes text."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"q": f"What is {a} plus {b}?", "choices": [str(a + b), str(a + b + 1)], "label": 0} for a, b in SUMS]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test", "doc_to_text": "{{q}}",
    }  # fmt: skip
    choose = {
        "task": "own_choices", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "target_delimiter": " ", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    write = {
        "task": "own_answers", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    # JSON is YAML.
    for name, own in (("choose", choose), ("write", write)):
        (folder / f"{name}.yaml").write_text(json.dumps(common | own))
    return folder


@pytest.fixture(scope="module")
def thinker(tiny_omni: Path) -> Any:
    from omnifp4.runtime import load

    return load(tiny_omni, device="cpu", dtype=torch.float32, speech=False, progress=False).thinker


def run(model: Path, tasks: Path, *names: str, **options: Any) -> HarnessReceipt:
    from omnifp4.evaluation import run_harness

    return run_harness(str(model), names, task_folder=tasks, dtype="float32", **options)


def test_here_and_on_a_server(tiny_omni: Path, tasks: Path, thinker: Any) -> None:
    here = run(tiny_omni, tasks, "own_choices")
    with serve(thinker) as (address, bodies):
        there = run(tiny_omni, tasks, "own_choices", server=address)
    assert bodies[0]["model"] == "the-model"
    assert all(isinstance(token, int) for token in bodies[0]["prompt"][0]), "the tokenizer is the checkpoint's"
    assert (here.server, there.server) == (None, address)
    (mine,), (theirs,) = here.results, there.results
    assert (mine.metric, mine.samples, mine.higher_is_better) == ("acc,none", len(SUMS), True)
    assert mine == theirs
    assert mine.value == pytest.approx(by_hand(tiny_omni, thinker))
    assert HarnessReceipt.model_validate_json(here.model_dump_json()) == here


def by_hand(folder: Path, thinker: Any) -> float:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))

    def likelihood(question: str, answer: str) -> float:
        before, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {answer}"))
        ids = torch.tensor([whole])
        with torch.no_grad():
            logs = thinker(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float().log_softmax(-1)
        places = range(len(before), len(whole))
        return float(sum(logs[place - 1, whole[place]] for place in places))

    right = [
        likelihood(f"What is {a} plus {b}?", str(a + b)) > likelihood(f"What is {a} plus {b}?", str(a + b + 1))
        for a, b in SUMS
    ]
    return sum(right) / len(right)


def test_a_chat_endpoint_and_the_limit(tiny_omni: Path, tasks: Path, thinker: Any) -> None:
    with serve(thinker, said="5") as (address, bodies):
        found = run(tiny_omni, tasks, "own_answers", server=address, chat=True, min_accuracy=0.5)
    assert bodies[0]["messages"][-1]["content"] == "What is 1 plus 1?"
    (one,) = found.results
    assert one.value == pytest.approx(sum(a + b == 5 for a, b in SUMS) / len(SUMS))
    assert (found.verdict, found.gates[0].verdict, found.gates[0].where) == (Verdict.FAIL, Verdict.FAIL, "own_answers")


def test_refusals(tiny_omni: Path, tasks: Path, thinker: Any) -> None:
    with pytest.raises(OmniFP4Error, match="lm-eval has no task 'nowhere'"):
        run(tiny_omni, tasks, "nowhere")
    with pytest.raises(OmniFP4Error, match="--min-accuracy is 2"):
        run(tiny_omni, tasks, "own_choices", min_accuracy=2.0)
    for option, told in (
        ({"limit": 0}, "--limit is 0 .1 or more"),
        ({"few_shot": -1}, "--few-shot is -1 .0 or more"),
        ({"batch_size": 0}, "batch_size is 0 .1 or more"),
    ):
        with pytest.raises(OmniFP4Error, match=told):
            run(tiny_omni, tasks, "own_choices", **option)
    with pytest.raises(OmniFP4Error, match="nowhere is no folder"):
        run(tiny_omni, tasks / "nowhere", "own_choices")
    with pytest.raises(OmniFP4Error, match=r"no server answers at http://127.0.0.1:9"):
        run(tiny_omni, tasks, "own_choices", server="127.0.0.1:9")
    with (
        serve(thinker, logprobs=False) as (address, _),
        pytest.raises(OmniFP4Error, match=r"cannot read what http://.* answers: .*echo with logprobs"),
    ):
        run(tiny_omni, tasks, "own_choices", server=address)
    with (
        serve(thinker) as (address, _),
        pytest.raises(OmniFP4Error, match="a chat endpoint gives no log-probabilities"),
    ):
        run(tiny_omni, tasks, "own_choices", server=address, chat=True)
