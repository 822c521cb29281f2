"""Which format each group of weights gets when their bits together are limited."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from omnifp4.formats.scheme import Scheme

MOST_STATES: Final = 200_000
"""Partial allocations that the exact search keeps; groups of a model share few sizes, so that it needs far fewer."""

SAME: Final = 1e-9
"""Relative difference of losses that are sums of the same numbers."""


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
    the budget that it then has spent; what is left buys the largest further savings that fit. Where another allocation is
    better still, it is found by going through all that can be (`MOST_STATES` at most are kept on the way).

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
    return _better(hulls, groups, _fill(groups, chosen, budget - spent), budget)


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


def _better(
    hulls: Mapping[str, list[Choice]], groups: Mapping[str, Sequence[Choice]], known: dict[str, Choice], budget: float
) -> dict[str, Choice]:
    """The best allocation, or `known` where that is as good or there are too many to go through.

    One group after the other is added to all partial allocations that no other beats in both cost and loss. Those are left
    out that could not beat `known` even if formats could be bought by the bit.
    """
    names = sorted(groups, key=lambda name: (-max(choice.cost for choice in groups[name]), name))
    most = sum(known[name].loss for name in names)
    most -= SAME * abs(most)
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for number, name in enumerate(names):
        costs, losses = (np.array([getattr(one, part) for one in groups[name]]) for part in ("cost", "loss"))
        cost, loss = (np.add.outer(own, more).ravel() for own, more in ((cost, costs), (loss, losses)))
        order = np.lexsort((loss, cost))
        before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
        kept = order[loss[order] < before]
        spent, saved = _by_the_bit([hulls[one] for one in names[number + 1 :]])
        left = budget * (1 + 1e-12) - cost[kept]
        kept = kept[(left >= spent[0]) & (loss[kept] + np.interp(left, spent, saved) < most)]
        if not len(kept) or len(kept) > MOST_STATES:
            return known
        steps.append((kept // len(costs), kept % len(costs)))
        cost, loss = cost[kept], loss[kept]
    place, chosen = int(loss.argmin()), dict(known)
    for name, (parents, picks) in zip(reversed(names), reversed(steps), strict=True):
        chosen[name] = groups[name][int(picks[place])]
        place = int(parents[place])
    return chosen


def _by_the_bit(hulls: Sequence[list[Choice]]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Least losses of groups together, by what is spent on them, if a part of an upgrade could be bought."""
    upgrades = sorted(
        (
            (dear.cost - cheap.cost, cheap.loss - dear.loss)
            for hull in hulls
            for cheap, dear in itertools.pairwise(hull)
        ),
        key=lambda upgrade: -upgrade[1] / upgrade[0],
    )
    spent = sum(hull[0].cost for hull in hulls) + np.cumsum([0.0, *(more for more, _ in upgrades)])
    saved = sum(hull[0].loss for hull in hulls) - np.cumsum([0.0, *(less for _, less in upgrades)])
    return spent, saved
