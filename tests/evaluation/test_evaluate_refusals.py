"""Data, pairs and memory that are not right: one line, before anything is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_data import SAMPLES, line

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
        (({"messages": "Hi", "task": " ", "answer": "x"},), "line 1: the task's name is ' '"),
        (({"messages": "Hi", "answer": " "},), "the answer is empty"),
        (({"messages": "Hi", "answer": 3},), "answer is 3 .it must be a str"),
        (({"messages": "Hi", "speak": True},), "no answer that could be spoken"),
        (({"messages": [{"role": "assistant", "content": "Hi"}]},), "the conversation has no user message"),
        ((line("a", "x"), line("a", "y")), "two samples have the id 'a'"),
        (
            ({"messages": [{"role": "user", "content": [{"image": "https://x.y/z.png"}]}]},),
            r"image 'https://x.y/z.png' is on the network .download it",
        ),
        (
            ({"messages": [{"role": "user", "content": [{"image": "gone.png"}]}]},),
            "image 'gone.png' is missing: no file",
        ),
        (
            ({"messages": [{"role": "user", "content": [{"image": "FTP://x.y/z.png"}]}]},),
            "image 'FTP://x.y/z.png' is on the network",
        ),
        (({"messages": [{"role": "user", "content": [{"image": "n" * 5000}]}]},), "is missing: no file"),
        (({"messages": [{"role": "user", "content": [{"image": "a\0b"}]}]},), r"'a.x00b' is missing: no file"),
        (("[" * 100_000,), "line 1: lists and objects are nested too deep"),
        ((r'{"messages": "Hi", "answer": "\ud83d"}',), "line 1: answer holds half of a surrogate pair"),
        ((r'{"messages": "Hi", "answer": "x", "id": "\udc00"}',), "line 1: id holds half of a surrogate pair"),
        ((r'{"messages": "Hi", "answer": "x", "task": "\udc00"}',), "line 1: task holds half of a surrogate pair"),
        ((r'{"messages": "Hi", "id": "a\nb"}',), "line 1: id is 'a.nb': it holds characters that cannot be shown"),
        ((r'{"messages": "\ud83d"}',), "half of a surrogate pair"),
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


def test_text_of_all_scripts(write_data: Callable[..., Path]) -> None:
    """JSON need not escape U+2028, U+0085 and their kin, so none of them ends a line; a mark may stand at the start."""
    from omnifp4.evaluation.data import read_data

    said = "漢字 العربية 👩‍👩‍👧\u2028next\u0085\x7f\u2029\u202e\u200b"
    raw = json.dumps({"messages": said, "answer": "はい\u2028🤷🏽"}, ensure_ascii=False)
    path = write_data(f"\ufeff{raw}\r", "", json.dumps({"messages": "Hi", "answer": None, "task": None, "id": None}))
    first, second = read_data(path)
    assert first.messages[0]["content"][0]["text"] == said
    assert (first.name, first.answer) == ("line 1", "はい\u2028🤷🏽")
    assert (second.name, second.answer, second.task) == ("line 3", None, ""), "null is as good as missing"


@pytest.mark.parametrize("form", ["relative", "absolute", "url", "URL"])
def test_where_media_lie(write_data: Callable[..., Path], tmp_path: Path, form: str) -> None:
    from omnifp4.evaluation.data import read_data

    file = tmp_path / "a folder" / "ä 100 %.wav"
    file.parent.mkdir()
    file.write_bytes(b"")
    named = {
        "relative": "a folder/ä 100 %.wav",
        "absolute": str(file),
        "url": file.as_uri(),
        "URL": file.as_uri().replace("file", "FILE"),
    }[form]
    (sample,) = read_data(write_data({"messages": [{"role": "user", "content": [{"audio": named}]}], "answer": "x"}))
    assert sample.messages[0]["content"][0]["audio"] == str(file)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"image": [[1, 2], [3]]}, "sample 'line 1': image: a value of type list is no image"),
        ({"audio": [[0.1, 0.2], [0.3]]}, "sample 'line 1': audio: a value of type list is no audio"),
        ({"video": [[1, [2]], [3]]}, "sample 'line 1': video: a value of type list is no image"),
        ({"audio": [None, None]}, "audio of type object is not read"),
    ],
)
def test_lists_that_are_no_media(write_data: Callable[..., Path], part: Any, told: str) -> None:
    from omnifp4.evaluation.data import read_data, read_media

    path = write_data({"messages": [{"role": "user", "content": [part]}], "answer": "x"})
    with pytest.raises(OmniFP4Error, match=told):
        read_media(read_data(path)[0])


def test_damaged_media(write_data: Callable[..., Path], tiny_omni: Path, tmp_path: Path) -> None:
    from omnifp4 import evaluate

    data = write_data({"id": "torn", "messages": [{"role": "user", "content": [{"image": "p.png"}]}], "answer": "x"})
    (data.parent / "p.png").write_bytes(b"no picture")
    with pytest.raises(OmniFP4Error, match="sample 'torn'"):
        evaluate(tiny_omni, against=tiny_omni, data=data, cache=tmp_path)


@pytest.mark.parametrize(
    ("told", "sample"),
    [
        ("marker '<|im_end|>' in its answer", {"messages": "Hi", "answer": "Yes<|im_end|>"}),
        ("<|im_start|>", {"messages": "Hi <|im_start|>assistant"}),
        ("no text that could be scored", {"messages": [{"role": "user", "content": [{"image": "3_219.png"}]}]}),
        ("tokens; the context has 10", {"messages": "Say it", "answer": "one two three"}),
    ],
)
def test_samples_that_cannot_be_encoded(
    tiny_omni: Path, write_data: Callable[..., Path], told: str, sample: Any
) -> None:
    from omnifp4.evaluation.data import read_data
    from omnifp4.evaluation.encoding import encode
    from omnifp4.evaluation.pair import open_pair

    data = write_data(sample)
    shutil.copy(SAMPLES / "3_219.png", data.parent)
    pair = open_pair(tiny_omni, tiny_omni)
    if "the context" in told:
        pair.config.thinker_config.text_config.max_position_embeddings = 10
    with pytest.raises(OmniFP4Error) as refused:
        encode(read_data(data)[0], pair.processor, pair.config)
    assert told in str(refused.value)


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
    refused(changed(tiny_omni, tmp_path / "v", "vocab.json", swap), "their tokenizers differ, first in 'a'")
    merges = shutil.copytree(tiny_omni, tmp_path / "m") / "merges.txt"
    first, *others = merges.read_text().splitlines(keepends=True)
    merges.write_text("".join([first, *others[:2][::-1], *others[2:]]))
    refused(tmp_path / "m", "their tokenizers differ, first in merges")


def test_what_makes_no_difference(tiny_omni: Path, tmp_path: Path) -> None:
    """Defaults that one config spells out are the same; another template is told, since both are asked in one."""
    from omnifp4.evaluation.pair import open_pair

    def spell(config: Any) -> None:
        config["thinker_config"]["text_config"]["attention_dropout"] = 0.0
        config["transformers_version"] = "9.9"

    copy = changed(tiny_omni, tmp_path / "s", "config.json", spell)
    assert open_pair(copy, tiny_omni).notes == ()
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert open_pair(copy, tiny_omni).notes == (
        "the model's chat template is not the reference's; both sides were asked in the reference's",
    )


def test_another_preprocessing_is_told(tiny_omni: Path, tmp_path: Path) -> None:
    """Served, such a model sees other pixels than it is judged by."""
    from omnifp4.evaluation.pair import open_pair

    def darker(preprocessor: Any) -> None:
        preprocessor["image_mean"] = [0.0, 0.0, 0.0]

    def shorter(preprocessor: Any) -> None:
        preprocessor["hop_length"] = 80

    for name, edit, first in (("d", darker, "image_mean"), ("h", shorter, "hop_length")):
        copy = changed(tiny_omni, tmp_path / name, "preprocessor_config.json", edit)
        (note,) = open_pair(copy, tiny_omni).notes
        assert note.startswith(f"the model's preprocessing is not the reference's, first in {first};")


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
        ({"seed": -1}, "--seed is -1 .0 or more"),
        ({"layers": 0}, "--layers is 0"),
        ({"layers": 1, "max_kl": 1.0}, "limits are for logits"),
        ({"layers": 9}, "has 4 decoder layers"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"min_code_agreement": 0.5, "speech": False}, "--min-code-agreement has nothing to judge .nothing is spoken"),
        ({"data": "nowhere.jsonl"}, "cannot be read as JSONL"),
    ],
)
def test_options(tiny_omni: Path, few: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    from omnifp4 import evaluate

    with pytest.raises(OmniFP4Error, match=told):
        evaluate(tiny_omni, against=tiny_omni, **{"data": few, "cache": tmp_path, **options})
