"""The engine of own kernels on a GPU: its tokens are those of the model's modules, whatever else runs beside them."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from omnifp4.benchmark.reference import plain_arithmetic
from omnifp4.chat.inputs import ModelInputs
from omnifp4.decoding import EngineFull, Sampling, choose_engine
from omnifp4.decoding.decoder_weights import join
from omnifp4.decoding.module_engine import ThinkerDecoder
from omnifp4.errors import OmniFP4Error

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
SAMPLES = files("omnifp4.evaluation") / "samples"
TIE = 0.5
"""Standard deviations of all logits between two that may be taken for each other: roundings differ."""
TIE_NOISE = 6
"""Or so many times what the modules' own two readings of a text differ by."""


@pytest.fixture(scope="module")
def artifact(trained_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model: routers of random weights hesitate, and then a rounding is another token."""
    from omnifp4 import quantize

    out = tmp_path_factory.mktemp("graph_engine") / "trained-nvfp4"
    quantize(trained_omni, out, threads=2)
    return out


@pytest.fixture(scope="module")
def model(artifact: Path) -> Any:
    from omnifp4.runtime import load

    return load(str(artifact), device="cuda", speech=True)


@pytest.fixture(scope="module")
def text(artifact: Path) -> list[int]:
    """Some 3,000 tokens of what people wrote."""
    from transformers import AutoTokenizer

    lines = [json.loads(line) for line in (SAMPLES / "samples.jsonl").read_text().splitlines()]
    told = [
        line["messages"][0]["content"][0]["text"] + line["answer"]
        for line in lines
        if line["id"].startswith("continue")
    ]
    return AutoTokenizer.from_pretrained(artifact)(" ".join(told + told[::-1]))["input_ids"]


@pytest.fixture
def engine(model: Any) -> Iterator[Any]:
    engine = choose_engine(model, "cuda-graph", most_sequences=32, context_tokens=2048)
    yield engine
    engine.close()


def prompt(*words: int) -> ModelInputs:
    ids = torch.tensor([words], device="cuda")
    return ModelInputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, False, "")


def ragged(text: list[int], count: int) -> list[ModelInputs]:
    return [prompt(*text[61 * n :][: 3 + 17 * n % 90]) for n in range(count)]


def generate(engine: Any, inputs: list[ModelInputs], count: int, sampling: Sampling | None = None) -> list[list[int]]:
    sequences = [engine.start(one, sampling or Sampling(), most_tokens=count) for one in inputs]
    for _ in range(count - 1):
        engine.step()
    for one in sequences:
        engine.stop(one)
    return [one.tokens for one in sequences]


def assert_greedy(model: Any, inputs: ModelInputs, tokens: list[int]) -> None:
    """Each token is the likeliest, or as good as it, under the history that the engine gave it.

    The modules read that history at once and token by token; where these differ, either may be right.
    """
    new = torch.tensor([tokens], device="cuda")
    tensors = dict(inputs.tensors)
    tensors["input_ids"] = torch.cat([tensors["input_ids"], new], dim=1)
    tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    with torch.no_grad(), plain_arithmetic(model):
        at_once = model.thinker(**tensors, use_cache=False).logits[0, inputs.prompt_tokens - 1 : -1].float()
        decoder = ThinkerDecoder(model, keep_states=False)
        stepped = torch.cat([decoder.prefill(inputs), *(decoder.step(token) for token in tokens[:-1])]).float()
    noise = ((stepped - at_once) / at_once.std(-1, keepdim=True)).square().mean().sqrt().item()
    behind = [(one.max(-1).values - one.gather(1, new.T)[:, 0]) / one.std(-1) for one in (at_once, stepped)]
    gaps = torch.minimum(*behind)
    assert noise < 0.3, "the modules can judge nobody"
    assert gaps.max() <= max(TIE, TIE_NOISE * noise), (noise, gaps.tolist())
    assert gaps.mean() <= 0.05, (noise, gaps.tolist())


@pytest.mark.parametrize("count", [1, 2, 5, 8, 13, 32])
def test_greedy_tokens_are_those_of_the_modules(model: Any, engine: Any, text: list[int], count: int) -> None:
    inputs = ragged(text, count)
    tokens_of = generate(engine, inputs, 24)
    for one, tokens in zip(inputs, tokens_of, strict=True):
        assert_greedy(model, one, tokens)
    assert generate(engine, inputs, 24) == tokens_of, "two runs give equal tokens"


@pytest.mark.parametrize(("kind", "answer"), [("images", "4"), ("audios", "2"), ("videos", "")])
def test_media_feed_the_same_decode(model: Any, artifact: Path, kind: str, answer: str) -> None:
    from PIL import Image

    from omnifp4.chat.omni_chat import OmniChat

    picture = Image.open(str(SAMPLES / "4_4.png")).convert("RGB")
    question, media = {
        "images": ("What number is shown?", picture),
        "audios": ("What does the speaker say?", str(SAMPLES / "2_nicolas_0.wav")),
        "videos": ("What number is shown?", [picture] * 4),
    }[kind]
    if kind == "audios":
        for library in ("soundfile", "soxr"):
            pytest.importorskip(library, reason=f"{library} is not installed")
    chat = OmniChat(str(artifact), device="cuda", engine="cuda-graph")
    seen: list[ModelInputs] = []
    start = chat.engine.start
    chat.engine.start = lambda inputs, *a, **k: (seen.append(inputs), start(inputs, *a, **k))[1]  # type: ignore[method-assign]
    told = chat.ask(question, max_new_tokens=16, temperature=0, **{kind: [media]})
    assert_greedy(model, seen[0], list(told.tokens))
    assert told.text.startswith(answer), "what the trained model hears and sees"


def test_a_sequence_does_not_depend_on_its_neighbours(engine: Any, text: list[int]) -> None:
    """Alone, among others that begin and end at other times, and drawn with its own seed."""
    for sampling in (
        Sampling(),
        Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=5),
        Sampling(temperature=1.0, seed=7),
    ):
        subject = ragged(text, 3)[2]
        (alone,) = generate(engine, [subject], 20, sampling)
        others = [
            engine.start(one, Sampling(temperature=1.0, seed=n), most_tokens=64)
            for n, one in enumerate(ragged(text, 6))
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


def test_seeds_and_penalty(engine: Any, text: list[int]) -> None:
    inputs = ragged(text, 2)
    drawn = generate(engine, inputs, 16, Sampling(temperature=1.0, top_k=50, seed=3))
    assert drawn == generate(engine, inputs, 16, Sampling(temperature=1.0, top_k=50, seed=3))
    assert drawn != generate(engine, inputs, 16, Sampling(temperature=1.0, top_k=50, seed=4))
    penalised = generate(engine, inputs, 24, Sampling(repetition_penalty=50.0))
    assert all(len(set(tokens)) == len(tokens) for tokens in penalised), "a strong penalty forbids repeats"


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 500, 512, 513])
def test_a_prompt_that_fills_a_graph_or_not(model: Any, engine: Any, text: list[int], length: int) -> None:
    """Short prompts are filled up: what fills them reaches neither their tokens nor their neighbours' cache."""
    neighbour, one = prompt(*text[700:790]), prompt(*text[:length])
    (alone,) = generate(engine, [neighbour], 20)
    for _ in range(2):
        beside = engine.start(neighbour, Sampling(), most_tokens=20)
        under_way = engine.start(one, Sampling(), most_tokens=8)
        for _ in range(7):
            engine.step([under_way])
        engine.stop(under_way)
        for _ in range(19):
            engine.step([beside])
        engine.stop(beside)
        assert beside.tokens == alone
        assert_greedy(model, one, under_way.tokens)


def test_a_context_over_many_pages(model: Any, text: list[int]) -> None:
    engine = choose_engine(model, "cuda-graph", most_sequences=2, context_tokens=3000)
    inputs = [prompt(*text[:length]) for length in (2500, 700)]
    for one, tokens in zip(inputs, generate(engine, inputs, 12), strict=True):
        assert_greedy(model, one, tokens)
    engine.close()


def test_places_and_room(model: Any, text: list[int]) -> None:
    engine = choose_engine(model, "cuda-graph", most_sequences=2, context_tokens=256)
    first, second = (engine.start(one, Sampling(), most_tokens=8) for one in ragged(text, 2))
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
