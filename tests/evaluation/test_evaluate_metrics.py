"""Divergence, agreement, perplexity and intervals against definitions worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")

from omnifp4.evaluation import distributions  # noqa: E402
from omnifp4.evaluation.distributions import Scores, compare, summarise  # noqa: E402
from omnifp4.evaluation.gates import Limits, judge  # noqa: E402
from omnifp4.evaluation.results import divergence  # noqa: E402
from omnifp4.evaluation.statistics import paired_share_difference, ratio_estimate  # noqa: E402


def logits(seed: int, positions: int = 40, vocabulary: int = 300) -> Any:
    return torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def by_hand(reference: Any, other: Any) -> Any:
    p, q = (values.double().softmax(-1).numpy() for values in (reference, other))
    return (p * np.log(p / q)).sum(-1)


def test_divergence_is_the_definition() -> None:
    reference, other = logits(0), logits(0) + 0.1 * logits(1)
    targets = torch.arange(40)
    known = summarise(reference, targets)
    scores = compare(known, other, targets)
    assert scores.kl == pytest.approx(by_hand(reference, other), rel=1e-5)
    assert (scores.agrees == (reference.argmax(-1) == other.argmax(-1)).numpy()).all()
    assert (scores.right == (other.argmax(-1) == targets).numpy()).all()
    log_target = other.double().log_softmax(-1)[torch.arange(40), targets].numpy()
    assert scores.log_target == pytest.approx(log_target, rel=1e-12)
    assert compare(known, reference, targets).kl.max() < 1e-6


def test_a_part_of_the_vocabulary_bounds_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, other = logits(0), logits(0) + 0.3 * logits(1)
    targets = torch.arange(40)
    exact = by_hand(reference, other)
    monkeypatch.setattr(distributions, "FULL_VOCABULARY", 100)
    monkeypatch.setattr(distributions, "KEPT", 60)
    known = summarise(reference, targets)
    assert known.log_probabilities.shape == (40, 60)
    scores = compare(known, other, targets)
    assert (scores.kl <= exact + 1e-6).all()
    assert (scores.kl > 0.8 * exact).all()
    # Likelihoods of the tokens that follow stay exact, kept or not.
    log_target = other.double().log_softmax(-1)[torch.arange(40), targets].numpy()
    assert scores.log_target == pytest.approx(log_target, rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_counted_and_left_out(bad: float) -> None:
    reference, other = logits(0), logits(0) + 0.1 * logits(1)
    targets = torch.arange(40)
    known = summarise(reference, targets)
    whole = compare(known, other, targets)
    other[7, 3] = bad
    torn = compare(known, other, targets)
    assert (~torn.finite).sum() == 1 and not torn.finite[7]
    found = divergence([compare(known, reference, targets)], [torn], seed=0)
    assert found.non_finite == 1
    assert found.kl_mean.value == pytest.approx(np.delete(whole.kl, 7).mean())


def test_perplexity_ratio_is_that_of_perplexities() -> None:
    targets = torch.arange(40)
    reference, other = logits(0), logits(0) + 0.2 * logits(1)
    known = summarise(reference, targets)
    own = compare(known, reference, targets)
    found = divergence([own], [compare(known, other, targets)], seed=0)
    nll = torch.nn.functional.cross_entropy(other.double(), targets)
    assert found.perplexity == pytest.approx(float(nll.exp()))
    before = torch.nn.functional.cross_entropy(reference.double(), targets)
    assert found.perplexity_ratio.value == pytest.approx(float((nll - before).exp()))


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """400 sets of 30 samples whose positions share an effect: pooled positions would be far too sure."""
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        counts = random.integers(5, 30, 30).astype(float)
        sums = random.normal(2.0, 1.0, 30) * counts
        estimate = ratio_estimate(sums, counts, seed=trial)
        assert estimate.low <= estimate.value <= estimate.high
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.88 < covered / 400 < 0.98


def test_intervals_are_seeded() -> None:
    values, ones = np.random.default_rng(0).normal(size=50), np.ones(50)
    assert ratio_estimate(values, ones, seed=1) == ratio_estimate(values, ones, seed=1)
    assert ratio_estimate(values, ones, seed=1) != ratio_estimate(values, ones, seed=2)


@pytest.mark.parametrize(("lost", "gained"), [(0.0, 0.0), (0.03, 0.01), (0.2, 0.1)])
def test_intervals_of_changed_answers_cover_the_truth(lost: float, gained: float) -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        drawn = random.random(100)
        before = drawn >= gained
        after = (drawn < gained) | (drawn >= gained + lost)
        estimate = paired_share_difference(before, after)
        assert estimate.value == pytest.approx(after.mean() - before.mean())
        covered += estimate.low <= gained - lost <= estimate.high
    assert covered / 500 > 0.93


def test_a_few_unchanged_answers_prove_little() -> None:
    """Twenty answers that stay right leave room for some points lost; three hundred for less than one."""
    few, many = (paired_share_difference(np.ones(count, bool), np.ones(count, bool)) for count in (20, 300))
    assert few.value == many.value == 0
    assert few.low < -0.1
    assert -0.01 < many.low < 0


def scores(kl: float, right: bool) -> Scores:
    true = np.array([True])
    return Scores(np.array([kl]), true, np.array([right]), np.array([-1.0]), true)


def test_gates_meet_the_worst_figure() -> None:
    from omnifp4.errors import OmniFP4Error
    from omnifp4.receipt.base import Verdict
    from omnifp4.receipt.evaluation import ModalityResult

    def modality(name: str, kl: float) -> ModalityResult:
        found = divergence([scores(0, True)], [scores(kl, True)], seed=0)
        return ModalityResult(modality=name, samples=1, positions=1, reference_perplexity=1.0, model=found, floor=None)

    both = [modality("text", 0.1), modality("audio", 0.3)]
    (passed,) = judge(Limits(max_kl=0.3), both, [], None)
    assert (passed.verdict, passed.where, passed.value) == (Verdict.PASS, "audio", 0.3)
    (failed,) = judge(Limits(max_kl=0.2), both, [], None)
    assert (failed.verdict, failed.option) == (Verdict.FAIL, "--max-kl")
    assert judge(Limits(), both, [], None) == ()
    with pytest.raises(OmniFP4Error, match=r"--min-accuracy has nothing to judge .give samples a task"):
        Limits(min_accuracy=0.9).check_data(tasks=False, digits=False, speech=True)
    with pytest.raises(OmniFP4Error, match=r"--min-code-agreement has nothing to judge .nothing is spoken"):
        Limits(min_code_agreement=0.9).check_data(tasks=True, digits=False, speech=False)
    Limits(min_accuracy=0.9).check_data(tasks=False, digits=True, speech=True)
    Limits(max_kl=1).check_data(tasks=False, digits=False, speech=False)
    with pytest.raises(OmniFP4Error, match=r"--min-top1 is 90.*0 to 1"):
        Limits(min_top1=90).check()
