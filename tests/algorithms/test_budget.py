"""Budgets: within them always, and near the best that trying everything finds."""

from __future__ import annotations

import itertools
import random

import pytest

from omnifp4.algorithms.budget import Choice, Impossible, allocate
from omnifp4.formats.scheme import Scheme


def groups_of(seed: int, count: int = 6) -> dict[str, list[Choice]]:
    generator = random.Random(seed)
    groups = {}
    for number in range(count):
        weights = generator.choice([10, 20, 50])
        loss = generator.expovariate(1.0)
        groups[f"group {number}"] = [
            Choice(Scheme.NVFP4, 4.5 * weights, loss),
            Choice(Scheme.FP8, 8 * weights, loss * generator.uniform(0.01, 0.6)),
            Choice(Scheme.WIDE, 16 * weights, 0.0),
        ]
    return groups


def total(chosen: dict[str, Choice]) -> tuple[float, float]:
    return sum(choice.cost for choice in chosen.values()), sum(choice.loss for choice in chosen.values())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_near_the_best_of_all_combinations(seed: int, share: float) -> None:
    groups = groups_of(seed)
    least = sum(min(choice.cost for choice in choices) for choices in groups.values())
    most = sum(max(choice.cost for choice in choices) for choices in groups.values())
    budget = least + share * (most - least)
    cost, loss = total(allocate(groups, budget))
    assert cost <= budget
    best = min(
        sum(choice.loss for choice in chosen)
        for chosen in itertools.product(*groups.values())
        if sum(choice.cost for choice in chosen) <= budget
    )
    worst = sum(max(choice.loss for choice in choices) for choices in groups.values())
    assert best <= loss + 1e-9
    assert loss - best <= 0.25 * (worst - best) + 1e-9


def test_all_of_it_where_the_budget_allows() -> None:
    groups = groups_of(1)
    chosen = allocate(groups, 1e9)
    assert {choice.scheme for choice in chosen.values()} == {Scheme.WIDE}


def test_a_budget_that_cannot_be_met_names_the_least() -> None:
    groups = groups_of(2)
    least = sum(min(choice.cost for choice in choices) for choices in groups.values())
    with pytest.raises(Impossible) as caught:
        allocate(groups, least - 1)
    assert caught.value.least == pytest.approx(least)
    assert {choice.scheme for choice in allocate(groups, least).values()} == {Scheme.NVFP4}


def test_a_format_that_costs_more_and_helps_less_is_never_bought() -> None:
    groups = {"one": [Choice(Scheme.NVFP4, 4, 1.0), Choice(Scheme.FP8, 8, 1.5), Choice(Scheme.WIDE, 16, 0.5)]}
    assert allocate(groups, 10)["one"].scheme is Scheme.NVFP4
    assert allocate(groups, 16)["one"].scheme is Scheme.WIDE
