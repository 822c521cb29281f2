"""Which format each group of weights gets when their bits together are limited."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omnifp4.formats.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Choice:
    """One format for one group.

    Attributes:
        scheme: the format.
        cost: bits that it takes, in whatever way the budget counts them.
        loss: what it costs the model, in any unit that is the same for all groups.
    """

    scheme: Scheme
    cost: float
    loss: float


class Impossible(ValueError):
    """No choice fits the budget.

    Attributes:
        least: what the cheapest choices cost together.
    """

    def __init__(self, budget: float, least: float) -> None:
        super().__init__(f"a budget of {budget:g} is below the least possible, {least:g}")
        self.least = least


def allocate(groups: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """Spend a budget where it saves the most loss per bit.

    Upgrades along each group's lower convex hull are bought in order of what they save per bit, which is the optimum for
    the budget that it then has spent; what is left buys the largest further savings that fit.

    Args:
        groups: for each group the formats that it may have.
        budget: most that all costs together may be.

    Raises:
        Impossible: the cheapest formats cost more than the budget.
    """
    hulls = {name: _hull(choices) for name, choices in groups.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = sum(choice.cost for choice in chosen.values())
    if spent > budget * (1 + 1e-12):
        raise Impossible(budget, spent)
    waiting = [(-_saving(hull[0], hull[1]), name, 1) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, name, place = heapq.heappop(waiting)
        hull = hulls[name]
        more = hull[place].cost - hull[place - 1].cost
        if spent + more > budget:
            continue
        spent += more
        chosen[name] = hull[place]
        if place + 1 < len(hull):
            heapq.heappush(waiting, (-_saving(hull[place], hull[place + 1]), name, place + 1))
    return _fill(groups, chosen, budget - spent)


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that are worth their cost, cheapest first: each saves less per bit than the one before."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.cost, choice.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _saving(cheap: Choice, dear: Choice) -> float:
    more = dear.cost - cheap.cost
    return (cheap.loss - dear.loss) / more if more > 0 else float("inf")


def _fill(groups: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], left: float) -> dict[str, Choice]:
    """Buy what still fits, the largest savings first."""
    while True:
        upgrades = [
            (chosen[name].loss - choice.loss, name, choice)
            for name, choices in groups.items()
            for choice in choices
            if choice.loss < chosen[name].loss and 0 <= choice.cost - chosen[name].cost <= left
        ]
        if not upgrades:
            return chosen
        _, name, choice = max(upgrades, key=lambda upgrade: upgrade[0])
        left -= choice.cost - chosen[name].cost
        chosen[name] = choice
