"""The engine of stock modules: many sequences at once give what each gives alone; places; the choice."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import copy
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from omnifp4.chat.generation import Options, TextRun
from omnifp4.chat.inputs import ModelInputs
from omnifp4.decoding import DecodingError, EngineFull, ModuleEngine, Sampling, choose_engine
from omnifp4.decoding.choosing import shared_engine


@pytest.fixture(scope="module")
def model(tiny_omni: Path) -> Any:
    from omnifp4.runtime import load

    return load(str(tiny_omni), device="cpu", speech=True)


def prompt(*words: int) -> ModelInputs:
    ids = torch.tensor([words])
    return ModelInputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, False, "")


PROMPTS = [prompt(5, 6, 7), prompt(900, 12, 44, 80, 3), prompt(1000)]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.2, seed=3),
    Sampling(temperature=0.5, seed=9),
]


def alone(model: Any, number: int, count: int) -> list[int]:
    engine = ModuleEngine(model)
    sequence = engine.start(PROMPTS[number], SAMPLINGS[number], most_tokens=count)
    for _ in range(count - 1):
        engine.step([sequence])
    return sequence.tokens


def test_together_as_alone(model: Any) -> None:
    """Sequences that begin and end at different times do not disturb each other."""
    engine = ModuleEngine(model)
    first = engine.start(PROMPTS[0], SAMPLINGS[0], most_tokens=12)
    engine.step()
    second = engine.start(PROMPTS[1], SAMPLINGS[1], most_tokens=12)
    engine.step()
    third = engine.start(PROMPTS[2], SAMPLINGS[2], most_tokens=12)
    for _ in range(4):
        engine.step()
    engine.stop(second)
    engine.stop(second)
    for _ in range(4):
        engine.step([third])
    engine.step()
    assert [len(one.tokens) for one in (first, second, third)] == [8, 6, 10]
    for number, sequence in enumerate((first, second, third)):
        assert sequence.tokens == alone(model, number, len(sequence.tokens))


def test_states_are_kept_if_wanted(model: Any) -> None:
    engine = ModuleEngine(model)
    assert engine.start(PROMPTS[0], Sampling(), most_tokens=1).states is None
    states = engine.start(PROMPTS[0], Sampling(), most_tokens=1, keep_states=True).states
    assert states is not None and states.shape == (1, 3, model.config.thinker_config.text_config.hidden_size)


def test_places(model: Any) -> None:
    engine = ModuleEngine(model, most_sequences=65)
    under_way = [engine.start(PROMPTS[2], Sampling(), most_tokens=2) for _ in range(engine.most_sequences)]
    with pytest.raises(EngineFull, match="65 sequences are under way"):
        engine.start(PROMPTS[2], Sampling(), most_tokens=2)
    engine.stop(under_way[3])
    engine.start(PROMPTS[2], Sampling(), most_tokens=2)


def test_what_never_fits(model: Any) -> None:
    engine = ModuleEngine(model, context_tokens=10)
    with pytest.raises(DecodingError, match=r"has 5 tokens and the text may have 6, together more than .* 10"):
        engine.start(PROMPTS[1], Sampling(), most_tokens=6)
    with pytest.raises(DecodingError, match="most_tokens is 0"):
        engine.start(PROMPTS[1], Sampling(), most_tokens=0)
    sequence = engine.start(PROMPTS[1], Sampling(), most_tokens=1)
    with pytest.raises(DecodingError, match="has all of its 1 tokens"):
        engine.step()
    engine.stop(sequence)
    engine.step()
    with pytest.raises(DecodingError, match="not under way"):
        engine.step([sequence])
    engine.close()
    with pytest.raises(DecodingError, match="closed"):
        engine.start(PROMPTS[1], Sampling(), most_tokens=1)


def test_a_run_that_nobody_holds_gives_its_place_back(model: Any) -> None:
    engine = ModuleEngine(model)
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "")
    run = TextRun(engine, PROMPTS[0], tokenizer, Sampling(), frozenset(), Options(max_new_tokens=3))
    run.advance()
    assert len(engine._under_way) == 1
    run.advance(), run.advance()
    assert run.finish_reason == "length" and not engine._under_way
    run = TextRun(engine, PROMPTS[0], tokenizer, Sampling(), frozenset(), Options(max_new_tokens=3))
    run.advance()
    del run
    gc.collect()
    assert not engine._under_way


def test_the_choice(model: Any) -> None:
    engine = choose_engine(model, "modules", most_sequences=100, context_tokens=64)
    assert (engine.name, engine.reason, engine.most_sequences, engine.context_tokens) == (
        "modules",
        "as asked for",
        100,
        64,
    )
    automatic = choose_engine(model)
    assert automatic.name == "modules" and automatic.reason.startswith("no CUDA graph: ")
    assert automatic.context_tokens == model.config.thinker_config.text_config.max_position_embeddings
    with pytest.raises(DecodingError, match=r"cuda-graph cannot run this model: .*--engine modules"):
        choose_engine(model, "cuda-graph")
    with pytest.raises(DecodingError, match=r"no engine 'fast' \(allowed: auto, modules, cuda-graph\)"):
        choose_engine(model, "fast")


def test_conversations_share_one_engine(model: Any) -> None:
    engine = shared_engine(model, context_tokens=100)
    assert shared_engine(model) is engine is shared_engine(model, "modules")
    with pytest.raises(DecodingError, match=r"context_tokens is 101, but .* made for 100"):
        shared_engine(model, context_tokens=101)
    other = copy.copy(model)
    vars(other)["_omnifp4_engines"] = copy.deepcopy(vars(model)["_omnifp4_engines"])
    assert shared_engine(other) is not engine
