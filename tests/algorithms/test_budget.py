"""Budgets: within them always, and as good as the best that trying everything finds."""

from __future__ import annotations

import itertools
import random
import time

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
def test_the_best_of_all_combinations(seed: int, share: float) -> None:
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
    assert loss == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_groups_of_any_size_and_formats_of_no_order(seed: int) -> None:
    generator = random.Random(seed)
    groups = {
        f"group {number}": [
            Choice(
                scheme, generator.choice([generator.randrange(1, 9), generator.uniform(1, 9)]), generator.gauss(1, 1)
            )
            for scheme in list(Scheme)[: generator.randint(1, 4)]
        ]
        for number in range(generator.randint(1, 6))
    }
    budget = generator.uniform(1, 1.5) * sum(min(one.cost for one in choices) for choices in groups.values())
    cost, loss = total(allocate(groups, budget))
    every = [total(dict(zip(groups, picks, strict=True))) for picks in itertools.product(*groups.values())]
    assert cost <= budget * (1 + 1e-9)
    assert loss == pytest.approx(min(one for spent, one in every if spent <= budget), rel=1e-8, abs=1e-12)


def test_as_many_groups_as_a_released_model_has_take_no_time() -> None:
    generator, groups = random.Random(0), {}
    for layer in range(48):
        for name, weights in (("attention", 18.9e6), ("o", 8.4e6), ("experts", 604e6)):
            loss = generator.expovariate(1.0) * weights
            groups[f"{layer} {name}"] = [
                Choice(Scheme.NVFP4, 4.5 * weights, loss),
                Choice(Scheme.FP8, 8 * weights, 0.1 * loss * generator.random()),
                Choice(Scheme.WIDE, 16 * weights, 0.0),
            ]
    least = sum(choices[0].cost for choices in groups.values())
    begin = time.process_time()
    for share in (1.01, 1.07, 1.4):
        cost, loss = total(allocate(groups, share * least))
        assert cost <= share * least
        assert loss < sum(choices[0].loss for choices in groups.values())
    assert time.process_time() - begin < 10


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
