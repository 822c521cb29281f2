"""Drawing on the device against Transformers' processors and `torch.multinomial`."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
steps = pytest.importorskip("transformers.generation.logits_process", reason="transformers is not installed")

from omnifp4.decoding.speech_sampling import CodeSampling, choose, keep_top_k, keep_top_p, penalise


def scores_of(seed: int, *, coarse: bool) -> torch.Tensor:
    """Coarse ones have many equals, as BF16 logits do."""
    scores = torch.randn((1, 400), generator=torch.Generator().manual_seed(seed)) * 3
    return (scores * 2).round() / 2 if coarse else scores


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_steps_are_those_of_transformers(seed: int, coarse: bool) -> None:
    scores = scores_of(seed, coarse=coarse)
    ids = torch.tensor([[3, 5, 3, 399]])
    seen = torch.zeros((1, 400), dtype=torch.bool).scatter_(1, ids, True)
    theirs = steps.RepetitionPenaltyLogitsProcessor(1.7)(ids, scores.clone())
    assert torch.equal(penalise(scores, seen, torch.tensor(1.7)), theirs) and not torch.equal(theirs, scores)
    for top_k in (1, 50, 1000):
        assert torch.equal(keep_top_k(scores, top_k), steps.TopKLogitsWarper(top_k)(ids, scores))
    for top_p in (1e-6, 0.3, 0.8, 0.999):
        assert torch.equal(keep_top_p(scores, top_p), steps.TopPLogitsWarper(top_p)(ids, scores))


@pytest.mark.parametrize("sampling", [CodeSampling(False), CodeSampling(False, top_k=20, top_p=0.8)])
def test_draws_are_those_of_multinomial(sampling: CodeSampling) -> None:
    temperature = torch.tensor(0.9)
    own = torch.Generator().manual_seed(8)
    torch.manual_seed(8)
    for seed in range(20):
        scores = scores_of(seed, coarse=False)
        theirs = scores / 0.9
        if sampling.top_k:
            theirs = steps.TopPLogitsWarper(0.8)(None, steps.TopKLogitsWarper(20)(None, theirs))
        expected = torch.multinomial(theirs.softmax(-1), 1)
        assert torch.equal(choose(scores, sampling, temperature, own), expected)


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    own = torch.Generator().manual_seed(0)
    drawn = torch.cat([choose(scores, CodeSampling(False), torch.ones(()), own) for _ in range(4000)])
    shares = torch.bincount(drawn[:, 0], minlength=4) / 4000
    assert (shares - scores[0].softmax(-1)).abs().max() < 0.03 and shares[3] == 0


def test_greedy_draws_nothing() -> None:
    own = torch.Generator().manual_seed(0)
    before = own.get_state()
    assert choose(scores_of(0, coarse=False), CodeSampling(True), torch.ones(()), own).shape == (1, 1)
    assert torch.equal(before, own.get_state())
