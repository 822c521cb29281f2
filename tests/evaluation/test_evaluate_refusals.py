"""Data, pairs and memory that are not right: one line, before anything is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_data import line

from omnifp4.errors import OmniFP4Error

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ((), "holds no samples"),
        (("not json",), "line 1: not JSON"),
        (("[1]",), "line 1: not an object"),
        (({"messages": "Hi", "anwser": "x"},), "unknown key 'anwser' .allowed: id, task, messages, answer, speak"),
        (({"messages": []},), "line 1: the conversation is empty"),
        (({"messages": "Hi", "task": "t"},), "a task needs an answer"),
        (({"messages": "Hi", "answer": " "},), "the answer is empty"),
        (({"messages": "Hi", "answer": 3},), "answer is 3 .it must be a str"),
        ((line("a", "x"), line("a", "y")), "two samples have the id 'a'"),
        (
            ({"messages": [{"role": "user", "content": [{"image": "gone.png"}]}]},),
            "image 'gone.png' is missing: no file",
        ),
    ],
)
def test_data(write_data: Callable[..., Path], lines: Any, told: str) -> None:
    from omnifp4.evaluation.data import read_data

    with pytest.raises(OmniFP4Error, match=told):
        read_data(write_data(*lines))


def test_forms_of_data(write_data: Callable[..., Path]) -> None:
    """A conversation that ends with the assistant has its answer there; media paths are relative to the file."""
    from omnifp4.evaluation.data import read_data

    path = write_data(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": [{"audio": "a.wav"}, {"image": "p.png"}]}], "answer": "x"},
    )
    for name in ("a.wav", "p.png"):
        (path.parent / name).write_bytes(b"")
    first, second = read_data(path)
    assert (first.answer, len(first.messages), first.modality) == ("Hello", 1, "text")
    assert (second.modality, second.name) == ("mixed", "line 2")
    assert second.messages[0]["content"][0]["audio"] == str(path.parent / "a.wav")


def test_damaged_media(write_data: Callable[..., Path], tiny_omni: Path, tmp_path: Path) -> None:
    from omnifp4 import evaluate

    data = write_data({"id": "torn", "messages": [{"role": "user", "content": [{"image": "p.png"}]}], "answer": "x"})
    (data.parent / "p.png").write_bytes(b"no picture")
    with pytest.raises(OmniFP4Error, match="sample 'torn'"):
        evaluate(tiny_omni, against=tiny_omni, data=data, cache=tmp_path)


def changed(source: Path, out: Path, name: str, edit: Callable[[Any], None]) -> Path:
    shutil.copytree(source, out)
    value = json.loads((out / name).read_text())
    edit(value)
    (out / name).write_text(json.dumps(value))
    return out


def test_mismatched_pairs(tiny_omni: Path, tmp_path: Path, few: Path) -> None:
    from omnifp4 import evaluate

    def refused(other: Path, told: str) -> None:
        with pytest.raises(OmniFP4Error, match=told):
            evaluate(other, against=tiny_omni, data=few, cache=tmp_path)

    def fewer(config: Any) -> None:
        config["thinker_config"]["text_config"]["num_experts_per_tok"] = 1

    def other_type(config: Any) -> None:
        config["model_type"] = "qwen3_moe"

    def swap(vocabulary: Any) -> None:
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    refused(
        changed(tiny_omni, tmp_path / "k", "config.json", fewer),
        "no pair: thinker_config.text_config.num_experts_per_tok is 1 in the one and 2 in the other",
    )
    refused(changed(tiny_omni, tmp_path / "t", "config.json", other_type), "type 'qwen3_moe' cannot be evaluated")
    refused(changed(tiny_omni, tmp_path / "v", "vocab.json", swap), "their tokenizers differ, first at 'a'")


def test_too_large_for_memory(tiny_omni: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omnifp4 import evaluate
    from omnifp4.evaluation import pair

    monkeypatch.setattr(pair, "available_bytes", lambda: 1_000_000)
    with pytest.raises(OmniFP4Error, match=r"GB and cpu has 0.0 GB free .--segmented runs it layer by layer"):
        evaluate(tiny_omni, against=tiny_omni, data=few, cache=tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "float16"}, "dtype is 'float16' .allowed: bfloat16, float32"),
        ({"max_kl": -1.0}, "--max-kl is -1.0"),
        ({"samples": 0}, "--samples is 0"),
        ({"layers": 0}, "--layers is 0"),
        ({"layers": 1, "max_kl": 1.0}, "limits are for logits"),
        ({"layers": 9}, "has 4 decoder layers"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"data": "nowhere.jsonl"}, "cannot be read as JSONL"),
    ],
)
def test_options(tiny_omni: Path, few: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    from omnifp4 import evaluate

    with pytest.raises(OmniFP4Error, match=told):
        evaluate(tiny_omni, against=tiny_omni, **{"data": few, "cache": tmp_path, **options})
