"""The engine of own kernels on a GPU: its tokens are those of the model's modules, whatever else runs beside them."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from omnifp4.chat.inputs import ModelInputs
from omnifp4.decoding import EngineFull, Sampling, choose_engine
from omnifp4.decoding.decoder_weights import join
from omnifp4.errors import OmniFP4Error

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
sys.path.insert(0, str(Path(__file__).parents[1] / "chat"))
import chat_media as made

TIE = 0.5
"""Standard deviations of all logits between two that may be taken for each other: roundings differ."""


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Any:
    from omnifp4.runtime import load

    return load(str(tiny_artifact), device="cuda", speech=True)


@pytest.fixture
def engine(model: Any) -> Iterator[Any]:
    engine = choose_engine(model, "cuda-graph", most_sequences=32, context_tokens=2048)
    yield engine
    engine.close()


def prompt(*words: int) -> ModelInputs:
    ids = torch.tensor([words], device="cuda")
    return ModelInputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, False, "")


def ragged(count: int) -> list[ModelInputs]:
    torch.manual_seed(count)
    return [prompt(*torch.randint(5, 900, (3 + 17 * n % 90,)).tolist()) for n in range(count)]


def generate(engine: Any, inputs: list[ModelInputs], count: int, sampling: Sampling | None = None) -> list[list[int]]:
    sequences = [engine.start(one, sampling or Sampling(), most_tokens=count) for one in inputs]
    for _ in range(count - 1):
        engine.step()
    for one in sequences:
        engine.stop(one)
    return [one.tokens for one in sequences]


def assert_greedy(model: Any, inputs: ModelInputs, tokens: list[int]) -> None:
    """Each token is the likeliest, or as good as it, under the history that the engine gave it."""
    new = torch.tensor([tokens], device="cuda")
    tensors = dict(inputs.tensors)
    tensors["input_ids"] = torch.cat([tensors["input_ids"], new], dim=1)
    tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    with torch.no_grad():
        logits = model.thinker(**tensors, use_cache=False).logits[0, inputs.prompt_tokens - 1 : -1].float()
    gaps = (logits.max(-1).values - logits.gather(1, new.T)[:, 0]) / logits.std(-1)
    assert gaps.max() <= TIE, gaps.tolist()
    assert gaps.mean() <= 0.05, gaps.tolist()


@pytest.mark.parametrize("count", [1, 2, 5, 8, 13, 32])
def test_greedy_tokens_are_those_of_the_modules(model: Any, engine: Any, count: int) -> None:
    inputs = ragged(count)
    tokens_of = generate(engine, inputs, 24)
    for one, tokens in zip(inputs, tokens_of, strict=True):
        assert_greedy(model, one, tokens)
    assert generate(engine, inputs, 24) == tokens_of, "two runs give equal tokens"


@pytest.mark.parametrize(
    "media", [{"images": made.picture()}, {"audios": made.tone()}, {"videos": [[made.picture()] * 4]}]
)
def test_media_feed_the_same_decode(model: Any, tiny_artifact: Path, media: dict[str, Any]) -> None:
    from omnifp4.chat.omni_chat import OmniChat

    chat = OmniChat(model, processor=str(tiny_artifact), engine="cuda-graph")
    seen: list[ModelInputs] = []
    start = chat.engine.start
    chat.engine.start = lambda inputs, *a, **k: (seen.append(inputs), start(inputs, *a, **k))[1]  # type: ignore[method-assign]
    answer = chat.ask("What is it?", max_new_tokens=16, temperature=0, **media)
    assert_greedy(model, seen[0], list(answer.tokens))


def test_a_sequence_does_not_depend_on_its_neighbours(engine: Any) -> None:
    """Alone, among others that begin and end at other times, and drawn with its own seed."""
    for sampling in (
        Sampling(),
        Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=5),
        Sampling(temperature=1.0, seed=7),
    ):
        subject = ragged(3)[2]
        (alone,) = generate(engine, [subject], 20, sampling)
        others = [
            engine.start(one, Sampling(temperature=1.0, seed=n), most_tokens=64) for n, one in enumerate(ragged(6))
        ]
        engine.step()
        sequence = engine.start(subject, sampling, most_tokens=20)
        for n in range(19):
            engine.step()
            if n == 5:
                engine.stop(others.pop())
        # Batches of other sizes add in another order: greedy ties and draws near an edge may part, the start may not.
        assert sequence.tokens[0] == alone[0]
        same = sum(a == b for a, b in zip(sequence.tokens, alone, strict=True))
        assert same >= 10, (sequence.tokens, alone)
        for one in [*others, sequence]:
            engine.stop(one)


def test_seeds_and_penalty(engine: Any) -> None:
    inputs = ragged(2)
    drawn = generate(engine, inputs, 16, Sampling(temperature=1.0, top_k=50, seed=3))
    assert drawn == generate(engine, inputs, 16, Sampling(temperature=1.0, top_k=50, seed=3))
    assert drawn != generate(engine, inputs, 16, Sampling(temperature=1.0, top_k=50, seed=4))
    penalised = generate(engine, inputs, 24, Sampling(repetition_penalty=50.0))
    assert all(len(set(tokens)) == len(tokens) for tokens in penalised), "a strong penalty forbids repeats"


def test_a_context_over_many_pages(model: Any) -> None:
    engine = choose_engine(model, "cuda-graph", most_sequences=2, context_tokens=3000)
    torch.manual_seed(0)
    inputs = [prompt(*torch.randint(5, 900, (length,)).tolist()) for length in (2500, 700)]
    for one, tokens in zip(inputs, generate(engine, inputs, 12), strict=True):
        assert_greedy(model, one, tokens)
    engine.close()


def test_places_and_room(model: Any) -> None:
    engine = choose_engine(model, "cuda-graph", most_sequences=2, context_tokens=256)
    first, second = (engine.start(one, Sampling(), most_tokens=8) for one in ragged(2))
    with pytest.raises(EngineFull):
        engine.start(prompt(5, 6), Sampling(), most_tokens=8)
    engine.stop(first)
    third = engine.start(prompt(5, 6), Sampling(), most_tokens=8)
    engine.step([second, third])
    with pytest.raises(OmniFP4Error, match="not under way"):
        engine.step([first])
    with pytest.raises(OmniFP4Error, match="256"):
        engine.start(prompt(*range(5, 265)), Sampling(), most_tokens=8)
    engine.close()


def test_a_second_engine_shares_the_weights(model: Any, engine: Any) -> None:
    """Projections that one engine joined are views of one storage, which the next finds as they are."""
    attention = model.thinker.model.layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    again = join(parts)
    assert again.weights.untyped_storage().data_ptr() == parts[0].packed.untyped_storage().data_ptr()
    before = torch.cuda.memory_allocated()
    choose_engine(model, "cuda-graph", most_sequences=1, context_tokens=64).close()
    assert torch.cuda.memory_allocated() - before < 1 << 20
