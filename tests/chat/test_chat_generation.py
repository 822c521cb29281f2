"""Text: equal to Transformers', streamed in final pieces, stopped, sampled and reproduced."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import chat_media as made

from omnifp4.chat.answer import Answer, TextPiece
from omnifp4.chat.errors import ChatError
from omnifp4.chat.generated import read_generated
from omnifp4.chat.generation import Options, eos_tokens, sampling_of
from omnifp4.chat.text_stream import TextStream
from omnifp4.decoding.engine import DecodingError
from omnifp4.decoding.module_engine import ThinkerDecoder
from omnifp4.decoding.sampling import Sampler


def stock_tokens(chat: Any, question: str, media: dict[str, Any], count: int) -> list[int]:
    """Transformers' own greedy answer to the same prompt."""
    from omnifp4.chat.inputs import build_inputs
    from omnifp4.chat.messages import user_message

    loaded, _ = chat.read([user_message(question, **media)])
    inputs = build_inputs(chat.model, chat.processor, loaded, device=chat.device)
    output = chat.model.generate(
        **inputs.tensors,
        return_audio=False,
        thinker_max_new_tokens=count,
        thinker_do_sample=False,
        thinker_eos_token_id=sorted(eos_tokens(chat.model)),
    )
    return list(read_generated(output, inputs.prompt_tokens).tokens[0])


@pytest.mark.parametrize(
    "media",
    [{}, {"images": made.picture(), "audios": made.tone()}, {"videos": [[made.picture()] * 2]}],
    ids=["text", "image and audio", "video"],
)
def test_greedy_text_is_that_of_transformers(new_chat: Callable[..., Any], media: dict[str, Any]) -> None:
    chat = new_chat(decoder=ThinkerDecoder)
    answer = chat.ask("Tell me a story.", **media, max_new_tokens=40)
    assert list(answer.tokens) == stock_tokens(chat, "Tell me a story.", media, 40)


def test_conversations_take_turns_on_one_model(new_chat: Callable[..., Any]) -> None:
    """Transformers keeps position shifts in the model; ours must not leak from one chat to another."""
    alone = new_chat().ask("Tell me.", images=made.picture(), max_new_tokens=20).tokens
    first, second = new_chat(), new_chat()
    one = first.stream("Tell me.", images=made.picture(), max_new_tokens=20)
    other = second.stream("Hello", max_new_tokens=20)
    for _ in range(3):
        next(one), next(other)
    assert list(one)[-1].tokens == alone
    other.close()


def test_streamed_text_is_the_final_text(new_chat: Callable[..., Any]) -> None:
    chat = new_chat()
    pieces: list[str] = []
    answer = chat.ask("Hello", on_text=pieces.append, max_new_tokens=60, temperature=1.5, seed=3)
    whole = chat.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == answer.text == whole
    assert len(pieces) > 10
    events = list(new_chat().stream("Hello", max_new_tokens=60, temperature=1.5, seed=3))
    assert [event.text for event in events if isinstance(event, TextPiece)] == pieces
    assert isinstance(events[-1], Answer) and events[-1].text == answer.text


def test_pieces_are_whole_characters(processor: Any) -> None:
    tokenizer = processor.tokenizer
    text = "Grüße, 世界! 🐉🔥 naïve — and a broken end "
    tokens = tokenizer(text)["input_ids"]
    cut = [*tokens, *tokenizer("世")["input_ids"][:1]]
    for ids in (tokens, cut, cut + tokens):
        stream = TextStream(tokenizer)
        pieces = [stream.add(token) for token in ids]
        assert all("\ufffd" not in piece for piece in pieces[: len(tokens)])
        pieces.append(stream.finish())
        assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_pieces_of_any_tokens(processor: Any) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        ids = random.integers(0, 2048, 40).tolist()
        stream = TextStream(processor.tokenizer)
        text = "".join(stream.add(token) for token in ids) + stream.finish()
        assert text == processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("stop", ["dragon", "on f", " the", "n", "🐉"])
def test_stop_strings(processor: Any, stop: str) -> None:
    text = "Once a dragon flew over the 🐉 hills"
    tokens = processor.tokenizer(text)["input_ids"]
    stream = TextStream(processor.tokenizer, (stop, "never"))
    given = ""
    for token in tokens:
        given += stream.add(token)
        assert text.startswith(given) and stop not in given, "nothing is given out that must be taken back"
    given += stream.finish()
    assert stream.stopped and given == text[: text.index(stop)] == stream.text


def test_held_back_text_comes_at_the_end(processor: Any) -> None:
    stream = TextStream(processor.tokenizer, ("hillside",))
    text = "over the hills"
    assert "".join(stream.add(token) for token in processor.tokenizer(text)["input_ids"]) + stream.finish() == text
    assert not stream.stopped


def test_an_answer_stops_at_its_string(new_chat: Callable[..., Any]) -> None:
    whole = new_chat().ask("Hello", max_new_tokens=20)
    middle = whole.text[len(whole.text) // 2 :][:4]
    answer = new_chat().ask("Hello", max_new_tokens=20, stop=middle)
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(middle)]
    assert answer.stats.new_tokens < 20


def test_end_marker_and_length(new_chat: Callable[..., Any]) -> None:
    chat = new_chat()
    assert chat.ask("Hello", max_new_tokens=5).finish_reason == "length"
    end = chat.model.config.im_end_token_id
    ids = iter([65, 66, end, 67])

    class Scripted:
        states = None

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def prefill(self, _: Any) -> Any:
            return torch.nn.functional.one_hot(torch.tensor([next(ids)]), 2048).float()

        step = prefill

    answer = new_chat(decoder=Scripted).ask("Hello")
    assert answer.finish_reason == "eos" and answer.tokens == (65, 66, end)
    assert answer.text == chat.processor.tokenizer.decode([65, 66])


def test_the_end_marker_is_the_configs(model: Any) -> None:
    assert eos_tokens(model) == {model.config.im_end_token_id}
    assert 151645 not in eos_tokens(model), "generate()'s default, which the tiny vocabulary does not have"


def test_seeds_reproduce(new_chat: Callable[..., Any]) -> None:
    def ask(seed: int) -> Any:
        return new_chat(temperature=1.0, seed=seed).ask("Hello", max_new_tokens=20).tokens

    state = torch.random.get_rng_state()
    assert ask(1) == ask(1) != ask(2)
    assert torch.equal(state, torch.random.get_rng_state()), "the program's own random numbers are left alone"


def test_sampling_follows_its_options(new_chat: Callable[..., Any]) -> None:
    greedy = new_chat().ask("Hello").tokens
    assert new_chat(temperature=1.0, top_k=1).ask("Hello").tokens == greedy
    assert new_chat(temperature=1.0, top_p=1e-6).ask("Hello").tokens == greedy
    assert new_chat(temperature=5.0).ask("Hello").tokens != greedy
    calm = new_chat(repetition_penalty=10.0).ask("Hello", max_new_tokens=30).tokens
    assert len(set(calm)) == 30


def test_sampling_defaults_come_from_the_checkpoint() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.9]])
    ids = torch.zeros((1, 1), dtype=torch.long)

    def picks(options: Options, **defaults: Any) -> set[int]:
        config = SimpleNamespace(**defaults)
        return {Sampler(sampling_of(options.changed(seed=seed), config), "cpu").pick(ids, logits) for seed in range(40)}

    assert picks(Options()) == {1}
    assert picks(Options(), do_sample=True, temperature=1.0) >= {1, 2}
    assert picks(Options(), do_sample=True, top_k=1) == {1}
    assert picks(Options(temperature=0), do_sample=True) == {1}
    assert picks(Options(temperature=1.0)) >= {1, 2}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": 3}, "there is no option 'max_tokens' (allowed: max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0 (allowed: 1 to"),
        ({"max_new_tokens": 1.5}, "a whole number"),
        ({"temperature": -1}, "allowed: 0 to 10"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"stop": [""]}, "not empty"),
        ({"stop": [3]}, "strings"),
    ],
)
def test_options_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ChatError) as told:
        Options().changed(**options)
    assert says in str(told.value)


def test_damaged_weights_are_told(load_tiny: Callable[[], Any], new_chat: Callable[..., Any]) -> None:
    broken = load_tiny()
    broken.thinker.lm_head.weight.data[5] = float("nan")
    chat = new_chat(model=broken)
    with pytest.raises(DecodingError, match=r"not finite after .* weights are damaged .*omnifp4 verify"):
        chat.ask("Hello")
    assert chat.history == []


def test_out_of_memory_is_one_line(new_chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = new_chat()

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(ThinkerDecoder, "prefill", full)
        with pytest.raises(ChatError, match="does not fit into memory: CUDA out of memory"):
            chat.ask("Hello")
    assert chat.history == [] and chat.ask("Hello").text


def test_figures(new_chat: Callable[..., Any]) -> None:
    answer = new_chat().ask("Hello", audios=made.tone(), speak=True)
    stats = answer.stats
    assert stats.new_tokens == 8 and stats.prompt_tokens > 13
    assert stats.seconds_to_first_token > 0 and stats.tokens_per_second > 0 and stats.peak_bytes > 1e8
    assert answer.waveform is not None and stats.speech_seconds == len(answer.waveform) / 24_000
    assert stats.real_time_factor == stats.speech_seconds_taken / stats.speech_seconds > 0
    assert "real-time factor" in stats.line() and "\n" not in stats.line()


WAV = torch.arange(6.0)


@pytest.mark.parametrize(
    ("output", "tokens", "waveforms"),
    [
        (torch.tensor([[1, 2, 3]]), [(3,)], None),
        (torch.tensor([1, 2, 3]), [(3,)], None),
        (torch.tensor([[1, 2, 3], [1, 2, 4]]), [(3,), (4,)], None),
        (SimpleNamespace(sequences=torch.tensor([[1, 2, 3]])), [(3,)], None),
        ((torch.tensor([[1, 2, 3]]), None), [(3,)], None),
        ((SimpleNamespace(sequences=torch.tensor([[1, 2, 3]])), None), [(3,)], None),
        ((torch.tensor([[1, 2, 3]]), WAV.view(1, 1, 6)), [(3,)], [6]),
        ((torch.tensor([[1, 2, 3]]), WAV), [(3,)], [6]),
        ([torch.tensor([[1, 2, 3]]), WAV.bfloat16()], [(3,)], [6]),
        ((SimpleNamespace(sequences=torch.tensor([[1, 2, 3]])), WAV.view(1, 1, 6)), [(3,)], [6]),
        ((torch.tensor([[1, 2, 3], [1, 2, 4]]), [WAV, WAV[:2]]), [(3,), (4,)], [6, 2]),
        ((torch.tensor([[1, 2, 3], [1, 2, 4]]), WAV.view(2, 1, 3)), [(3,), (4,)], [3, 3]),
    ],
)
def test_all_that_generate_returns(output: Any, tokens: Any, waveforms: list[int] | None) -> None:
    read = read_generated(output, 2)
    assert list(read.tokens) == tokens
    if waveforms is None:
        assert read.waveforms is None
    else:
        assert read.waveforms is not None and [len(one) for one in read.waveforms] == waveforms
        assert all(one.dtype == np.float32 and one.ndim == 1 for one in read.waveforms)


@pytest.mark.parametrize(
    "output", [None, "text", (1, 2, 3), (torch.zeros(1, 2, 3), None), (torch.tensor([[1]]), [WAV, WAV])]
)
def test_what_generate_never_returned_is_told(output: Any) -> None:
    with pytest.raises(ChatError, match="generate\\(\\) returned"):
        read_generated(output, 0)


def test_what_this_version_returns(new_chat: Callable[..., Any]) -> None:
    """The real thing, in each of its forms."""
    chat = new_chat()
    from omnifp4.chat.inputs import build_inputs

    inputs = build_inputs(chat.model, chat.processor, chat.read("Hello")[0], device=chat.device)
    count = inputs.prompt_tokens
    common = {
        "thinker_max_new_tokens": 4,
        "thinker_do_sample": False,
        "thinker_eos_token_id": 2017,
        "talker_max_new_tokens": 4,
    }
    plain = chat.model.generate(**inputs.tensors, return_audio=False, **common)
    full = chat.model.generate(**inputs.tensors, return_audio=False, thinker_return_dict_in_generate=True, **common)
    spoken = chat.model.generate(**inputs.tensors, return_audio=True, **common)
    twice = {key: value.repeat(2, 1) for key, value in inputs.tensors.items()}
    batch = chat.model.generate(**twice, return_audio=True, **common)
    kinds = {type(output).__name__ for output in (plain, full, spoken, batch)}
    assert kinds == {"Tensor", "GenerateDecoderOnlyOutput", "tuple"}
    read = [read_generated(output, count) for output in (plain, full, spoken, batch)]
    assert all(tokens == read[0].tokens[0] and len(tokens) == 4 for one in read for tokens in one.tokens)
    assert read[0].waveforms is None is read[1].waveforms
    assert read[2].waveforms is not None and read[3].waveforms is not None and len(read[3].waveforms) == 2
