"""Our loop for speech against Transformers' ``generate()``: the same codes, bit for bit, by every way to make them."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from omnifp4.decoding.speech_choice import choose_speech
from omnifp4.decoding.speech_engine import LEAST_CAPACITY, SpeechEngine, engine_for
from omnifp4.decoding.speech_fixed import FixedSteps
from omnifp4.decoding.speech_sampling import CodeSampling
from omnifp4.decoding.speech_steps import ModuleSteps, read_prompt
from omnifp4.decoding.talker_opening import Opening, assemble, written_text
from omnifp4.errors import OmniFP4Error
from omnifp4.runtime.quantizer import mend_talker
from omnifp4.runtime.torchvision_on_cpu import declare_missing_operators

GREEDY = CodeSampling(greedy=True, repetition_penalty=1.05)
SAMPLED = CodeSampling(greedy=False, temperature=0.9, top_k=50, top_p=1.0, repetition_penalty=1.05)
FRAMES = 8
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def load(tiny_omni: Path) -> Callable[..., Any]:
    declare_missing_operators()

    def load(dtype: Any, device: str = "cpu") -> Any:
        model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(
            tiny_omni, dtype=dtype, local_files_only=True
        )
        mend_talker(model)
        return model.eval().to(device)

    return load


@pytest.fixture(scope="module")
def models(load: Callable[..., Any]) -> dict[Any, Any]:
    return {dtype: load(dtype) for dtype in DTYPES}


@pytest.fixture
def never_ends(models: dict[Any, Any]) -> Iterator[None]:
    hooks = [never_end(model) for model in models.values()]
    yield
    for hook in hooks:
        hook.remove()


def never_end(model: Any, logit: float = -1e4) -> Any:
    end = model.config.talker_config.codec_eos_token_id

    def change(_: Any, __: Any, logits: Any) -> Any:
        logits[..., end] = logit
        return logits

    return model.talker.codec_head.register_forward_hook(change)


def conversation(model: Any, kind: str) -> dict[str, Any]:
    """A prompt as the template writes it, with the places of a picture or a sound."""
    config = model.config
    thinker = config.thinker_config
    start, newline = config.im_start_token_id, 198
    media: list[int] = []
    tensors: dict[str, Any] = {}
    if kind == "image":
        media = [thinker.vision_start_token_id, *[thinker.image_token_id] * 4]
        tensors["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    if kind == "audio":
        media = [thinker.audio_start_token_id, *[thinker.audio_token_id] * 13]
        tensors["feature_attention_mask"] = torch.ones((1, 100), dtype=torch.long)
    ids = [start, config.user_token_id, newline, *media, 40, 41, 42, config.im_end_token_id, newline]
    ids += [start, config.assistant_token_id, newline]
    prompt = torch.tensor([ids], device=model.device)
    moved = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **moved}


def opening_of(model: Any, kind: str = "text") -> tuple[Opening, dict[str, Any], Any]:
    """The talker's input, and what Transformers' generate() takes to make the same."""
    tensors = conversation(model, kind)
    prompt = tensors["input_ids"]
    made = torch.Generator().manual_seed(11)
    hidden = model.config.thinker_config.text_config.hidden_size
    states = torch.randn((1, prompt.shape[1], hidden), generator=made).to(model.device, model.dtype)
    eos = model.config.im_end_token_id
    written = written_text(model, prompt, states, (50, 51, 52, 53, 54, 55), eos)
    return assemble(model, tensors, written, eos=eos, speaker="chelsie"), tensors, written


def stock_codes(model: Any, kind: str, seed: int, frames: int, **talker: Any) -> Any:
    """Codes that Transformers' generate() makes, `[frames, groups]`."""
    _, tensors, written = opening_of(model, kind)
    codes: list[Any] = []
    hook = model.talker.register_forward_hook(lambda _, __, output: codes.append(output.hidden_states[1]))
    model.thinker.generate = lambda **_: written
    torch.manual_seed(seed)
    try:
        model.generate(
            **tensors,
            return_audio=True,
            speaker="chelsie",
            thinker_eos_token_id=model.config.im_end_token_id,
            talker_max_new_tokens=frames + 1,
            **{f"talker_{name}": value for name, value in talker.items()},
        )
    finally:
        hook.remove()
        del model.thinker.generate
    return torch.cat([code for code in codes if code is not None])


def codes_of(
    model: Any, name: str, opening: Opening, sampling: CodeSampling, *, seed: int = 3, frames: int = FRAMES
) -> Any:
    made = engine_for(model.talker, name).frames(opening, sampling, seed=seed, most_frames=frames)
    return torch.stack(list(made))


@pytest.mark.usefixtures("never_ends")
@pytest.mark.parametrize("kind", ["text", "image", "audio"])
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_codes_are_those_of_transformers(models: dict[Any, Any], dtype: Any, greedy: bool, kind: str) -> None:
    model = models[dtype]
    opening, _, _ = opening_of(model, kind)
    stock = stock_codes(model, kind, 3, FRAMES, do_sample=not greedy)
    assert stock.shape == (FRAMES, model.talker.config.num_code_groups) and len(stock.unique()) > 16
    for name in ("modules", "fixed"):
        ours = codes_of(model, name, opening, GREEDY if greedy else SAMPLED)
        assert torch.equal(ours, stock), name


@pytest.mark.usefixtures("never_ends")
def test_positions_of_media_reach_the_talker(models: dict[Any, Any]) -> None:
    """A picture takes fewer positions than places in the cache; the steps after it go on from there."""
    model = models[torch.float32]
    opening, _, _ = opening_of(model, "image")
    states = []
    for name, shift in (("modules", 0), ("fixed", 0), ("fixed", 1)):
        with torch.no_grad():
            _, _, cache, own = read_prompt(model.talker, opening.inputs)
            assert own.tolist() == [-2]
            steps = ModuleSteps() if name == "modules" else FixedSteps(model.talker, 64)
            steps.begin(model.talker, cache, own + shift, opening.prompt_tokens)
            states.append(steps.talk(model.talker, opening.pad))
    assert torch.allclose(states[0], states[1], atol=1e-5) and (states[0] - states[2]).abs().max() > 1e-4


@pytest.mark.usefixtures("never_ends")
def test_longer_speech_outgrows_memory(models: dict[Any, Any]) -> None:
    """The first memory is for short speech; a longer one gets more, and a shorter one after it changes nothing."""
    model = models[torch.float32]
    opening, _, _ = opening_of(model)
    engine = SpeechEngine(model.talker, "fixed")
    short = list(engine.frames(opening, GREEDY, seed=0, most_frames=5))
    long = list(islice(engine.frames(opening, GREEDY, seed=0, most_frames=LEAST_CAPACITY + 1), 8))
    assert engine._frame is not None and engine._frame.most_frames == 2 * LEAST_CAPACITY
    again = list(engine.frames(opening, GREEDY, seed=0, most_frames=5))
    assert engine._frame.most_frames == 2 * LEAST_CAPACITY
    assert len(short) == 5 and torch.equal(torch.stack(short), torch.stack(long[:5]))
    assert torch.equal(torch.stack(short), torch.stack(again))


@pytest.mark.parametrize("name", ["modules", "fixed"])
def test_the_end(models: dict[Any, Any], name: str) -> None:
    """At the code that ends speech, which is no frame itself; at once, or after some."""
    model = models[torch.float32]
    opening, _, _ = opening_of(model)
    hook = never_end(model, 1e4)
    try:
        assert list(engine_for(model.talker, name).frames(opening, GREEDY, seed=0, most_frames=9)) == []
    finally:
        hook.remove()
    seen: list[Any] = []
    end = model.config.talker_config.codec_eos_token_id

    def end_at_the_third(_: Any, __: Any, logits: Any) -> Any:
        seen.append(None)
        logits[..., end] = 1e4 if len(seen) == 4 else -1e4
        return logits

    hook = model.talker.codec_head.register_forward_hook(end_at_the_third)
    try:
        assert len(list(engine_for(model.talker, name).frames(opening, GREEDY, seed=0, most_frames=9))) == 3
    finally:
        hook.remove()


@pytest.mark.usefixtures("never_ends")
@pytest.mark.parametrize("name", ["modules", "fixed"])
def test_seeds_and_values_of_the_day(models: dict[Any, Any], name: str) -> None:
    model = models[torch.float32]
    opening, _, _ = opening_of(model)
    first = codes_of(model, name, opening, SAMPLED, frames=5)
    state = torch.random.get_rng_state()
    other = codes_of(model, name, opening, SAMPLED, seed=4, frames=5)
    cold = codes_of(model, name, opening, replace(SAMPLED, temperature=1e-3), frames=5)
    firm = codes_of(model, name, opening, replace(SAMPLED, repetition_penalty=5.0), frames=5)
    assert torch.equal(first, codes_of(model, name, opening, SAMPLED, frames=5))
    assert torch.equal(state, torch.random.get_rng_state()), "nobody else's random numbers are used"
    assert not torch.equal(first, other)
    greedy = codes_of(model, name, opening, GREEDY, frames=5)
    assert torch.equal(cold[0, 0], greedy[0, 0]), "a low temperature takes the likeliest first code"
    assert len(firm[:, 0].unique()) == 5, "a strong penalty never takes a code twice"


@pytest.mark.usefixtures("never_ends")
def test_left_early_and_begun_again(models: dict[Any, Any]) -> None:
    model = models[torch.float32]
    opening, _, _ = opening_of(model)
    engine = engine_for(model.talker, "fixed")
    whole = list(engine.frames(opening, SAMPLED, seed=1, most_frames=6))
    made = engine.frames(opening, SAMPLED, seed=2, most_frames=6)
    next(made)
    made.close()
    again = list(engine.frames(opening, SAMPLED, seed=1, most_frames=6))
    assert torch.equal(torch.stack(whole), torch.stack(again))


@pytest.mark.parametrize("name", ["modules", "fixed"])
@pytest.mark.parametrize("where", ["prompt", "talker", "predictor"])
def test_damaged_weights_are_an_error(load: Callable[..., Any], name: str, where: str) -> None:
    model = load(torch.float32)
    never_end(model)
    opening, _, _ = opening_of(model)
    with torch.no_grad():
        if where == "prompt":
            model.talker.codec_head.weight[7] = torch.nan
        elif where == "predictor":
            model.talker.code_predictor.model.layers[0].self_attn.v_proj.weight[0, 0] = torch.inf
        else:
            made = engine_for(model.talker, name).frames(opening, GREEDY, seed=0, most_frames=4)
            next(made)
            model.talker.model.norm.weight[0] = torch.nan
            with pytest.raises(OmniFP4Error, match=r"not finite after 1 frames.*omnifp4 verify"):
                list(made)
            return
    with pytest.raises(OmniFP4Error, match=r"not finite after 0 frames.*omnifp4 verify"):
        codes_of(model, name, opening, GREEDY, frames=4)


def test_engines_are_kept_and_go_with_their_model(load: Callable[..., Any]) -> None:
    model = load(torch.float32)
    never_end(model)
    engine = engine_for(model.talker, "fixed")
    assert engine_for(model.talker, "fixed") is engine and engine_for(model.talker, "modules") is not engine
    opening, _, _ = opening_of(model)
    codes_of(model, "fixed", opening, GREEDY, frames=2)
    frame = engine._frame
    codes_of(model, "fixed", opening, SAMPLED, frames=2)
    assert engine._frame is not frame, "drawing and taking the likeliest are different graphs"
    gone = weakref.ref(model.talker)
    del model, engine, frame, opening
    gc.collect()
    assert gone() is None


def test_weights_that_moved_are_found(load: Callable[..., Any]) -> None:
    """A captured graph reads addresses; after a cast or a move they hold something else."""
    model = load(torch.float32)
    never_end(model)
    opening, _, _ = opening_of(model)
    codes_of(model, "fixed", opening, GREEDY, frames=2)
    frame = engine_for(model.talker, "fixed")._frame
    codes_of(model, "fixed", opening, GREEDY, frames=2)
    assert engine_for(model.talker, "fixed")._frame is frame
    model.to(torch.bfloat16)
    opening, _, _ = opening_of(model)
    codes_of(model, "fixed", opening, GREEDY, frames=2)
    assert engine_for(model.talker, "fixed")._frame is not frame


def test_choice(models: dict[Any, Any]) -> None:
    model = models[torch.float32]
    assert choose_speech(model) == ("modules", "no CUDA graph: the talker is on cpu")
    for name in ("stock", "modules", "fixed"):
        assert choose_speech(model, name) == (name, "it was asked for")
    with pytest.raises(OmniFP4Error, match="'cuda-graph' cannot run this talker: the talker is on cpu"):
        choose_speech(model, "cuda-graph")
    with pytest.raises(OmniFP4Error, match=r"speech_engine is 'fast' \(allowed: auto, cuda-graph"):
        choose_speech(model, "fast")


def test_choice_of_a_talker_in_pieces() -> None:
    talker = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    model = SimpleNamespace(talker=talker)
    assert choose_speech(model)[0] == "stock" and "lies on cpu, meta" in choose_speech(model)[1]
    with pytest.raises(OmniFP4Error, match="'modules' cannot run this talker: the talker lies on cpu, meta"):
        choose_speech(model, "modules")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_graph_gives_the_codes_of_its_arithmetic(load: Callable[..., Any], dtype: Any, sampling: CodeSampling) -> None:
    model = load(dtype, "cuda")
    never_end(model)
    opening, _, _ = opening_of(model, "audio")
    assert choose_speech(model)[0] == "cuda-graph"
    graph = codes_of(model, "cuda-graph", opening, sampling, frames=30)
    assert torch.equal(graph, codes_of(model, "cuda-graph", opening, sampling, frames=30)), "twice the same"
    assert torch.equal(graph, codes_of(model, "fixed", opening, sampling, frames=30))
    other = codes_of(model, "cuda-graph", opening, sampling, seed=4, frames=30)
    assert torch.equal(graph, other) == sampling.greedy
    assert torch.equal(graph, codes_of(model, "cuda-graph", opening, sampling, frames=30)), "and after another seed"
