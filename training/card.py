"""The model card's tables, from the results of an examination."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from training.data import Data

TASKS = {
    "picture": "which digit is in the picture",
    "sound": "which digit is spoken",
    "add picture picture": "add two pictures",
    "add picture sound": "add two: picture and sound",
    "add sound sound": "add two recordings",
    "larger picture picture": "name the larger of two pictures",
    "larger picture sound": "name the larger of two: picture and sound",
    "larger sound sound": "name the larger of two recordings",
    "smaller picture picture": "name the smaller of two pictures",
    "smaller picture sound": "name the smaller of two: picture and sound",
    "smaller sound sound": "name the smaller of two recordings",
    "arithmetic": "arithmetic in text",
    "repeat": "repeat, every token right",
}
PERPLEXITY = "perplexity per token"


def tables(results: dict[str, Any], data: Data) -> Iterator[str]:
    """Lines of Markdown.

    Args:
        results: what ``results.json`` holds.
        data: for the bytes of the held-out text.
    """
    thinker = results["thinker in BF16"]
    yield from ("| task | right |", "|---|---:|")
    for task, name in TASKS.items():
        if task in thinker:
            yield f"| {name} | {thinker[task]:.1%} |"
    bits = math.log2(thinker[PERPLEXITY]) * len(data.test_text) / int(data.test_bytes)
    yield from ("", f"Perplexity of held-out text: {thinker[PERPLEXITY]:.1f} per token, {bits:.2f} bits per byte.", "")
    yield from ("| spoken answers recognised | greedy | sampled |", "|---|---:|---:|")
    for who in results["speech, greedy"]:
        yield f"| {who} | {results['speech, greedy'][who]:.1%} | {results['speech, sampled'][who]:.1%} |"
    for key, name in (("weights", "weights"), ("activations", "activations of the thinker")):
        yield from ("", f"| {name} | excess kurtosis | max / RMS |", "|---|---:|---:|")
        for kind, spread in results[key].items():
            yield f"| {kind} | {spread['excess_kurtosis']:.1f} | {spread['max_over_rms']:.1f} |"
