"""Right before fast: an engine's greedy tokens against the model's own modules, before anything is timed.

The modules read prompt and new tokens in one forward, so every new token is judged under the very history that the
engine gave it, also after the two would have parted. Equal is the rule. Where the modules would have taken another
token, its logit may be ahead by no more than a bound, because two ways to add the same BF16 numbers round differently.
That bound grows with what the modules differ from themselves, at the same context, when they read the same tokens one by
one: routers that hesitate between two experts make that more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from omnifp4.benchmark.prompts import inputs_of, make_prompt
from omnifp4.benchmark.reference import Continuation, Reference, plain_arithmetic
from omnifp4.benchmark.settings import CHECK_TOKENS
from omnifp4.decoding import DecodingError, Engine, EngineFull, Sampling, Sequence
from omnifp4.decoding.module_engine import ThinkerDecoder
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.verification import Check

LEAST_TIE: Final = 0.5
"""A gap between two logits up to this many standard deviations of all logits is a tie in any case: a token drawn blindly
is about four behind."""
TIE_NOISE: Final = 6.0
"""Or up to this many times the modules' own noise (root mean square, in those standard deviations)."""
LEAST_MEAN: Final = 0.01
"""Bound of the mean gap of all tokens, equal ones counted as 0: many small partings are no ties."""
MEAN_NOISE: Final = 8.0
"""Or this many times the square of that noise: errors of a given size change few tokens, and those by about as much."""
MOST_NOISE: Final = 0.3
"""Modules that differ from themselves by more than this can judge nobody."""
FINDINGS: Final = 12


@dataclass
class Judged:
    """The outcome for one context.

    Attributes:
        noise: of the modules, see `_noise`.
        checks: each with its verdict.
        distinct: mean number of distinct experts a layer and step, by batch.
    """

    noise: float
    checks: list[Check] = field(default_factory=list)
    distinct: dict[int, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.verdict is Verdict.PASS for check in self.checks)


def check_engine(
    model: Any,
    engine: Engine,
    *,
    batches: Many[int],
    context: int,
    seed: int,
    device: torch.device,
) -> Judged:
    """Checks an engine at one context, at each batch.

    Args:
        model: with a thinker.
        engine: with room for the largest of `batches`.
        batches: numbers of sequences at once; their prompts have different lengths.
        context: length of the longest prompt, in tokens.
        seed: of the prompts.
        device: of the model.
    """
    prompts = [
        make_prompt(model.config, ragged_length(context, number), seed=seed + number, device=device)
        for number in range(max(batches))
    ]
    sequences: list[Continuation] = []
    owners: list[tuple[int, int]] = []
    """Batch and number in it, of each of `sequences`."""
    unequal: list[str] = []
    for batch in batches:
        try:
            first, second = (_generate(engine, prompts[:batch]) for _ in range(2))
        except EngineFull:
            raise
        except DecodingError as error:
            return Judged(0.0, [_broken(batch, context, error)])
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            if one != other:
                unequal.append(
                    f"batch {batch}, sequence {number}: token {_parting(one, other)} differs between two runs"
                )
            sequences.append(Continuation(prompts[number].tensors["input_ids"][0], tuple(one)))
            owners.append((batch, number))
    reference = Reference(model, sequences)
    noise = _noise(model, reference)
    judged = Judged(noise=noise)
    judged.checks += _judge_tokens(model, reference, owners, noise, context)
    judged.checks.append(
        Check(
            name=f"repeat.{context}",
            title="two runs give equal tokens",
            verdict=Verdict.FAIL if unequal else Verdict.PASS,
            summary=f"context {context}: {len(owners)} sequences of {CHECK_TOKENS} tokens, made twice: "
            + (f"{len(unequal)} differ" if unequal else "all equal"),
            findings=tuple(unequal[:FINDINGS]),
            finding_count=len(unequal),
            fix="this is a race in the engine: --engine modules has none" if unequal else "",
        )
    )
    experts = getattr(model.config.thinker_config.text_config, "num_experts", 0)
    for batch in batches:
        rows = [row for row, (owner, _) in enumerate(owners) if owner == batch]
        found = reference.distinct_experts(rows, experts)
        if found is not None:
            judged.distinct[batch] = found
    return judged


def _broken(batch: int, context: int, error: DecodingError) -> Check:
    return Check(
        name=f"tokens.{context}",
        title="greedy tokens are those of the model's modules",
        verdict=Verdict.FAIL,
        summary=f"context {context}, batch {batch}: the engine made none",
        findings=(str(error),),
        finding_count=1,
    )


def ragged_length(context: int, number: int) -> int:
    """Length of the prompt of a sequence: the first has `context` tokens, the others up to half less."""
    return context - number * 5 % max(1, context // 2)


def _generate(engine: Engine, prompts: Many[Any]) -> list[list[int]]:
    under_way: list[Sequence] = []
    try:
        for prompt in prompts:
            under_way.append(engine.start(prompt, Sampling(), most_tokens=CHECK_TOKENS))
        for _ in range(CHECK_TOKENS - 1):
            engine.step(under_way)
    finally:
        for one in under_way:
            engine.stop(one)
    return [list(one.tokens) for one in under_way]


def _parting(one: Many[int], other: Many[int]) -> int:
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def _noise(model: Any, reference: Reference) -> float:
    """What the modules' logits differ by when the first text is read token by token, in their standard deviations."""
    read_at_once = reference.logits(0)
    difference = (_token_by_token(model, reference.sequences[0]) - read_at_once) / read_at_once.std(-1, keepdim=True)
    return float(difference.square().mean().sqrt())


def _token_by_token(model: Any, text: Continuation) -> torch.Tensor:
    """The modules' logits of each new token, float32 ``[tokens, vocabulary]``, one forward a token as in decoding."""
    decoder = ThinkerDecoder(model, keep_states=False)
    with plain_arithmetic(model):
        stepped = [decoder.prefill(inputs_of(text.prompt.unsqueeze(0)))]
        stepped += [decoder.step(token) for token in text.tokens[:-1]]
    return torch.cat(stepped).float()


def _behind(logits: torch.Tensor, tokens: Many[int]) -> list[float]:
    """How far each token's logit is behind the greatest, in standard deviations."""
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
    found: list[float] = ((logits.max(-1).values - chosen) / logits.std(-1)).tolist()
    return found


def _judge_tokens(
    model: Any, reference: Reference, owners: Many[tuple[int, int]], noise: float, context: int
) -> tuple[Check, Check]:
    most_gap, most_mean = max(LEAST_TIE, TIE_NOISE * noise), max(LEAST_MEAN, MEAN_NOISE * noise**2)
    gaps: list[float] = []
    told: list[tuple[float, str]] = []
    infinite: list[str] = []
    parted = 0
    for row, (batch, number) in enumerate(owners):
        logits, tokens = reference.logits(row), reference.sequences[row].tokens
        if not bool(logits.isfinite().all()):
            infinite.append(f"batch {batch}, sequence {number}")
            continue
        best = logits.argmax(-1).tolist()
        behind = _behind(logits, tokens)
        if max(behind) > most_gap:
            # A router that hesitates may fall the other way in one forward over all tokens. The modules' other reading
            # is as much their word, and the only one that an engine that steps can agree with at such a place.
            behind = [
                min(pair)
                for pair in zip(behind, _behind(_token_by_token(model, reference.sequences[row]), tokens), strict=True)
            ]
        gaps += behind
        for place, (gap, token, wanted) in enumerate(zip(behind, tokens, best, strict=True)):
            # Of exactly equal logits either may be taken.
            parted += token != wanted and gap > 0
            if gap > most_gap:
                told.append((gap, f"batch {batch}, sequence {number}: token {place} is {token}, the modules say {wanted}, {gap:.2f} ahead"))  # fmt: skip
    mean = sum(gaps) / len(gaps) if gaps else float("inf")
    finding = [text for _, text in sorted(told, reverse=True)]
    if mean > most_mean:
        finding.append(f"mean gap of all tokens {mean:.4f}, bound {most_mean:.4f}")
    if noise > MOST_NOISE or math.isnan(noise):
        finding.append(f"the modules' own noise is {noise:.2f}, more than {MOST_NOISE}: they can judge nobody")
    red = bool(finding) or not gaps
    unit = "standard deviations of the logits"
    tokens_check = Check(
        name=f"tokens.{context}",
        title="greedy tokens are those of the model's modules",
        verdict=Verdict.FAIL if red else Verdict.PASS,
        summary=f"context {context}: {len(gaps)} tokens, {len(gaps) - parted} equal; largest gap {max(gaps, default=0):.3f} "
        f"(bound {most_gap:.3f}), mean {mean:.4f} (bound {most_mean:.4f}), in {unit}; the modules' own noise is {noise:.4f}",
        findings=tuple(finding[:FINDINGS]),
        finding_count=len(finding),
        fix="--engine modules runs the model's own modules" if red else "",
    )
    finite = Check(
        name=f"finite.{context}",
        title="logits are finite",
        verdict=Verdict.FAIL if infinite else Verdict.PASS,
        summary=f"context {context}: {len(infinite)} of {len(owners)} sequences have logits that are not finite",
        findings=tuple(infinite[:FINDINGS]),
        finding_count=len(infinite),
        fix="omnifp4 verify MODEL" if infinite else "",
    )
    return tokens_check, finite
