"""Decoding and prefill of the thinker's text decoder in vLLM, measured as `omnifp4 bench` measures our own engines.

    PYTHON_WITH_VLLM benchmarks/vllm_decode.py ARTIFACT                    # an NVFP4 checkpoint in compressed-tensors' form
    PYTHON_WITH_VLLM benchmarks/vllm_decode.py FOLDER --weights random     # BF16: FOLDER needs no more than config.json

Prompts, batches, numbers of tokens and repeats are those of `omnifp4 bench --context 64 --prefill 64,2048`: random
tokens, another prompt for each sequence, greedy, no stop. Run both one after the other on the same machine; of
`benchmarks/vllm_handover.py FOLDER --variants none`, which writes an artifact of the full shape, ARTIFACT is FOLDER/artifact.

- Decoding is the time of all tokens less that of the first ones, both from `LLM.generate`, whose results come at the end:
  the way that costs vLLM least. Its engine runs in a process of its own, as is its default.
- vLLM's dummy weights choose the same experts for every token, which flatters. So `--weights random` draws them anew in
  vLLM's own memory once they are laid out, with the spreads of this package's random checkpoints: routers choose freely.
- No prefix is cached. The time to the first token includes vLLM's scheduler and its processes, as it does for its users.

Needs vLLM and torch, and nothing of omnifp4. Prints progress to stderr and one JSON line with rows named as in the
receipt of `omnifp4 bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PLAIN_TOKENS = 151_644
"""Of the released vocabulary, below all markers: `omnifp4 bench` draws its prompts from the same."""
SPREADS = (("gate.weight", 1.5), ("lm_head", 2.5))
"""Standard deviations times the square root of the inputs, by part of a name; 1 for other matrices."""
EMBEDDING_STD = 0.5
WARM_TOKENS = 16

VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    # Lets a function of ours run where the model is: to draw weights, and to count their bytes.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


def weight_bytes(model: Any) -> int:
    """Of all parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def draw_weights(model: Any) -> int:
    """Fills every parameter by its role; returns their number."""
    import torch

    random = torch.Generator("cuda").manual_seed(0)
    count = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            count += 1
            if parameter.dim() < 2:
                mean, std = (1.0, 0.08) if "norm" in name else (0.0, 0.02)
            elif "embed_tokens" in name:
                mean, std = 0.0, EMBEDDING_STD
            else:
                times = next((times for part, times in SPREADS if part in name), 1.0)
                mean, std = 0.0, times / parameter.shape[-1] ** 0.5
            # An expert at a time: normal_ of a whole layer's experts would need as much memory again.
            for piece in parameter if parameter.dim() > 2 else (parameter,):
                piece.normal_(mean, std, generator=random)
    return count


def spread(values: list[float]) -> dict[str, float | int]:
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "repeats": len(values),
    }


class Timer:
    """Times `LLM.generate` on prompts like those of the bench."""

    def __init__(self, llm: Any, seed: int) -> None:
        self._llm, self._seed = llm, seed

    def _prompts(self, tokens: int, first: int, count: int) -> list[dict[str, list[int]]]:
        import torch

        made = []
        for number in range(first, first + count):
            random = torch.Generator().manual_seed(self._seed + number)
            ids = torch.randint(0, PLAIN_TOKENS, (1, tokens), generator=random)
            made.append({"prompt_token_ids": ids[0].tolist()})
        return made

    def seconds(self, prompt_tokens: int, first: int, count: int, new: int) -> float:
        """Of `count` answers of `new` tokens each."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = self._prompts(prompt_tokens, first, count)
        begin = time.perf_counter()
        answers = self._llm.generate(prompts, sampling, use_tqdm=False)
        passed = time.perf_counter() - begin
        made = [len(answer.outputs[0].token_ids) for answer in answers]
        if made != [new] * count:
            raise SystemExit(f"asked for {count} times {new} tokens and got {made}")
        return passed

    def decode_row(self, batch: int, context: int, new: int, repeats: int) -> dict[str, Any]:
        self.seconds(context, 0, batch, WARM_TOKENS)
        first = statistics.median(self.seconds(context, 0, batch, 1) for _ in range(repeats))
        # One more than `new`, as the first is not counted.
        rest = [self.seconds(context, 0, batch, new + 1) - first for _ in range(repeats)]
        return {
            "batch": batch,
            "prompt_tokens": context,
            "new_tokens": new,
            "first_tokens_seconds": first,
            "tokens_per_second": spread([batch * new / seconds for seconds in rest]),
        }

    def prefill_row(self, tokens: int, repeats: int) -> dict[str, Any]:
        timed = [self.seconds(tokens, number, 1, 1) for number in range(repeats + 1)][1:]
        return {
            "prompt_tokens": tokens,
            "first_token_seconds": spread(timed),
            "tokens_per_second": spread([tokens / seconds for seconds in timed]),
        }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--weights", choices=("checkpoint", "random"), default="checkpoint")
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32])
    parser.add_argument("--context", type=numbers, default=[64])
    parser.add_argument("--prefill", type=numbers, default=[64, 2048])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU that vLLM takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    begin = time.perf_counter()
    import torch
    from vllm import LLM

    say(f"vLLM imported in {time.perf_counter() - begin:.1f} s")
    config = json.loads((arguments.model / "config.json").read_text())
    random = arguments.weights == "random"
    changed: dict[str, Any] = {}
    if random and "quantization_config" in config:
        # What is drawn here is BF16, whatever the folder holds.
        parser.error(f"{arguments.model}: --weights random is for a config without quantization_config")
    if "thinker_config" in config:
        changed["language_model_only"] = True
    begin = time.perf_counter()
    llm = LLM(
        model=str(arguments.model),
        skip_tokenizer_init=True,
        load_format="dummy" if random else "auto",
        dtype="bfloat16",
        max_model_len=max(*arguments.context, *arguments.prefill) + arguments.new_tokens + WARM_TOKENS,
        max_num_seqs=max(arguments.batch),
        gpu_memory_utilization=arguments.memory,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **changed,
    )
    start = time.perf_counter() - begin
    if random:
        say(f"{llm.apply_model(draw_weights)[0]} parameters drawn anew")
    figures: dict[str, Any] = {
        "engine": f"vLLM {metadata.version('vllm')}",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "model": arguments.model.name,
        "weights": "BF16, random" if random else config.get("quantization_config", {}).get("format", "BF16"),
        "weight_bytes": llm.apply_model(weight_bytes)[0],
        "start_seconds": round(start, 1),
        "date": time.strftime("%Y-%m-%d"),
        "prefill": [],
        "decode": [],
    }
    say(f"engine ready in {start:.1f} s, {figures['weight_bytes'] / 1e9:.2f} GB of weights")
    timer = Timer(llm, arguments.seed)
    begin = time.perf_counter()
    timer.seconds(64, 0, 1, WARM_TOKENS)
    say(f"first answer in {time.perf_counter() - begin:.1f} s")
    for context in arguments.context:
        for batch in arguments.batch:
            row = timer.decode_row(batch, context, arguments.new_tokens, arguments.repeats)
            figures["decode"].append(row)
            say(json.dumps(row))
    for tokens in arguments.prefill:
        row = timer.prefill_row(tokens, arguments.repeats)
        figures["prefill"].append(row)
        say(json.dumps(row))
    print(json.dumps(figures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
