"""How fast speech is made: full-size talker, code predictor and code2wav with random BF16 weights, no checkpoint.

    python benchmarks/speech_speed.py

Checks first that a captured frame gives the codes of the same arithmetic without a graph; prints no speed if not.
A frame is 80 ms of sound; the real-time factor is time to make over time to hear, and has to stay below 1.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from omnifp4.chat.speech import MOST_CONTEXT, NEXT_FRAMES, FrameDecoder, decode_beside
from omnifp4.decoding.speech_choice import choose_speech
from omnifp4.decoding.speech_engine import SpeechEngine
from omnifp4.decoding.speech_graph import CapturedRun
from omnifp4.decoding.speech_sampling import CodeSampling
from omnifp4.decoding.talker_opening import Opening
from omnifp4.runtime.torchvision_on_cpu import declare_missing_operators
from omnifp4.tiny import released_config, tiny_config

FRAME_SECONDS = 0.08
SAMPLED = CodeSampling(greedy=False, temperature=0.9, top_k=50, top_p=1.0, repetition_penalty=1.05)
GREEDY = CodeSampling(greedy=True, repetition_penalty=1.05)


def random_model(config: dict[str, Any], device: str) -> Any:
    """Talker and code2wav, every parameter drawn; rotary tables as their constructors make them."""
    declare_missing_operators()
    from transformers import Qwen3OmniMoeConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
        Qwen3OmniMoeCode2Wav,
        Qwen3OmniMoeTalkerForConditionalGeneration,
    )

    whole = Qwen3OmniMoeConfig(**config)
    torch.manual_seed(0)
    with torch.device(device):
        talker = Qwen3OmniMoeTalkerForConditionalGeneration._from_config(whole.talker_config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        code2wav = Qwen3OmniMoeCode2Wav._from_config(whole.code2wav_config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for module in (talker, code2wav):
            for name, value in module.named_parameters():
                if value.dim() > 1:
                    value.normal_(0, 0.02)
                elif name.endswith(("bias", "alpha", "beta")):
                    value.zero_()
                else:
                    value.fill_(1.0)
    return SimpleNamespace(talker=talker.eval(), code2wav=code2wav.eval(), config=whole)


def opening_of(model: Any, prompt_tokens: int, text_tokens: int) -> Opening:
    """A talker's input with the states of a thinker that is not there. The code that ends speech is suppressed."""
    talker, config = model.talker, model.config.talker_config
    hidden = config.text_config.hidden_size

    def states(tokens: int) -> torch.Tensor:
        return torch.randn((1, tokens, hidden), device=talker.device, dtype=talker.dtype) * 0.05

    vocabulary = config.text_config.vocab_size
    ids = torch.full((1, prompt_tokens), model.config.tts_pad_token_id, device=talker.device)
    return Opening(
        inputs={
            "inputs_embeds": states(prompt_tokens),
            "attention_mask": torch.ones_like(ids),
            "talker_input_ids": ids,
        },
        text=states(text_tokens),
        pad=states(1),
        eos=config.codec_eos_token_id,
        suppressed=tuple(range(vocabulary - 1024, vocabulary)),
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.05,
    )


def codes_of(engine: SpeechEngine, opening: Opening, sampling: CodeSampling, frames: int, most: int) -> torch.Tensor:
    made = engine.frames(opening, sampling, seed=7, most_frames=most)
    return torch.stack(list(islice(made, frames)))


def timed(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `repeats` runs, on the device's own clock where it has one."""
    if device.type != "cuda":
        result = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            result.append((time.perf_counter() - began) * 1e3)
        return result
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    for _ in range(3):
        run()
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def stock_frame_ms(model: Any, opening: Opening, few: int, many: int) -> list[float]:
    """Transformers' generate(): the time of `many` frames less that of `few`, by their number, three times."""
    config = model.config.talker_config

    def say(frames: int) -> float:
        torch.manual_seed(0)
        torch.cuda.synchronize() if model.talker.device.type == "cuda" else None
        began = time.perf_counter()
        with torch.no_grad():
            output = model.talker.generate(
                **opening.inputs,
                trailing_text_hidden=opening.text,
                tts_pad_embed=opening.pad,
                max_new_tokens=frames + 1,
                do_sample=True,
                top_k=50,
                top_p=1.0,
                temperature=0.9,
                eos_token_id=config.codec_eos_token_id,
                repetition_penalty=1.05,
                suppress_tokens=list(opening.suppressed),
                output_hidden_states=True,
                return_dict_in_generate=True,
            )
        torch.stack([states[-1] for states in output.hidden_states if states[-1] is not None]).cpu()
        return time.perf_counter() - began

    say(2)
    return [(say(many) - say(few)) / (many - few) * 1e3 for _ in range(3)]


def speech(engine: SpeechEngine, model: Any, opening: Opening, frames: int, most: int) -> tuple[float, float]:
    """Seconds to the first piece of sound, and to the last of `frames` frames, heard in chunks."""
    pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
    decoder = FrameDecoder(model, pieces, True)
    first: list[float] = []
    began = time.perf_counter()

    def listen() -> None:
        while pieces.get() is not None:
            first.append(time.perf_counter() - began)

    listener = threading.Thread(target=listen)
    listener.start()
    made = islice(engine.frames(opening, SAMPLED, seed=1, most_frames=most), frames)
    decode_beside(made, decoder, threading.Event())
    pieces.put(None)
    listener.join()
    return first[0], first[-1]


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, to try the script")
    parser.add_argument("--frames", type=int, default=250, help="of a speech; 80 ms each")
    parser.add_argument("--most-frames", type=int, default=3750, help="that memory is made for; chat's is 3750")
    parser.add_argument("--prompt", type=int, default=200, help="tokens that the talker reads first")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stock-frames", type=int, default=12, help="of Transformers' generate(); 0 leaves it out")
    parser.add_argument("--json", help="write the figures there")
    options = parser.parse_args()
    began = time.perf_counter()
    model = random_model(tiny_config() if options.tiny else released_config("qwen3-omni-30b-a3b"), options.device)
    device = model.talker.device
    opening = opening_of(model, options.prompt, 60)
    way, reason = choose_speech(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; engine {way}: {reason}")
    size = {part: sum(p.nbytes for p in getattr(model, part).parameters()) for part in ("talker", "code2wav")}
    print(", ".join(f"{part} {nbytes / 2**30:.2f} GiB" for part, nbytes in size.items()))
    print(f"loaded after {time.perf_counter() - began:.1f} s", flush=True)

    fast = SpeechEngine(model.talker, "cuda-graph" if device.type == "cuda" else "fixed")
    fixed, modules = SpeechEngine(model.talker, "fixed"), SpeechEngine(model.talker, "modules")
    most = options.most_frames
    for label, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        before = time.perf_counter()
        graph = codes_of(fast, opening, sampling, 20, most)
        captured = time.perf_counter() - before
        again = codes_of(fast, opening, sampling, 20, most)
        eager = codes_of(fixed, opening, sampling, 20, most)
        stock = codes_of(modules, opening, sampling, 20, most)
        alike = int((graph == stock).all(1).long().cumprod(0).sum())
        values = len(torch.unique(graph))
        print(
            f"{label}: graph equals the same arithmetic without it: {torch.equal(graph, eager)}; run twice: "
            f"{torch.equal(graph, again)}; first {alike} of 20 frames are those of Transformers' modules; {values} "
            f"different codes; first use {captured:.1f} s",
            flush=True,
        )
        if not torch.equal(graph, eager) or not torch.equal(graph, again):
            differing = int((~(graph == eager).all(1)).long().argmax())
            print(f"red: frame {differing}: {graph[differing].tolist()} and {eager[differing].tolist()}")
            return 1

    frame = fast._frame
    assert frame is not None
    figures: dict[str, Any] = {"device": name, "torch": torch.__version__, "engine": way}

    def measure(label: str, run: Callable[[], None], repeats: int) -> None:
        with torch.no_grad():
            # The place in the cache goes on with every step and is put back, so that no run leaves the cache.
            result = timed(CapturedRun(run, frame.generator) if device.type == "cuda" else run, repeats, device)
        figures[label] = result
        print(f"{label}: {spread(result, 3)} ms", flush=True)

    start = torch.randn_like(frame._hidden)
    place = frame.steps._place  # type: ignore[attr-defined]

    def talk() -> None:
        frame.steps.talk(model.talker, start)
        place.sub_(1)

    measure("talker step", talk, 50)
    measure("code predictor, a whole frame", lambda: void(frame.predict(model.talker)), 50)

    for count in (12, NEXT_FRAMES + MOST_CONTEXT):
        codes = torch.randint(0, model.code2wav.config.codebook_size, (1, frame.groups, count), device=device)
        with torch.no_grad():
            result = timed(partial(model.code2wav, codes), 5, device)
        figures[f"code2wav of {count} frames"] = result
        print(f"code2wav of {count} frames: {spread(result)} ms", flush=True)

    speech(fast, model, opening, min(100, options.frames), most)
    both = [speech(fast, model, opening, options.frames, most) for _ in range(options.repeats)]
    firsts, lasts = [first for first, _ in both], [last for _, last in both]
    factors = [last / (options.frames * FRAME_SECONDS) for last in lasts]
    figures |= {"first sound, s": firsts, "real-time factor": factors}
    print(f"first sound after {spread(firsts, 3)} s; {options.frames} frames in {spread(lasts)} s")
    print(f"real-time factor, all three parts: {spread(factors, 3)}", flush=True)
    if options.stock_frames:
        stock_ms = stock_frame_ms(model, opening, 2, options.stock_frames)
        figures["stock frame, ms"] = stock_ms
        factor = statistics.median(stock_ms) / FRAME_SECONDS / 1e3
        print(f"Transformers' generate(), talker and predictor: {spread(stock_ms, 1)} ms a frame, factor {factor:.2f}")
    print(f"done after {time.perf_counter() - began:.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


def void(_: object) -> None:
    """Drops a result."""


if __name__ == "__main__":
    sys.exit(main())
