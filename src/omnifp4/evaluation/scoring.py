"""Reference and model over all samples: what was worked out before is read from the cache, the rest is run and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from torch import Tensor

from omnifp4.errors import CheckpointError
from omnifp4.evaluation.distributions import Distributions, Scores, compare, summarise
from omnifp4.evaluation.encoding import EncodedSample
from omnifp4.evaluation.sides import ATTENTION, OTHER_ATTENTION, Request, Side
from omnifp4.evaluation.store import Arrays, Store

SAMPLES_AT_ONCE: Final = 16
"""Between two looks at the progress, where a side is loaded whole."""

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ReferenceScores:
    """The reference's own part, sample by sample.

    Attributes:
        distributions: of the reference.
        own: the reference against itself: its own right answers.
        floor: the reference under another attention; empty if it was not run.
        cached: samples that came from the cache.
    """

    distributions: list[Distributions]
    own: list[Scores]
    floor: list[Scores]
    cached: int


def score_reference(
    samples: Sequence[EncodedSample], open_side: Callable[[], Side], store: Store, *, floor: bool, tell: Tell
) -> ReferenceScores:
    """Distributions of the reference, and its noise floor.

    Args:
        samples: to be run.
        open_side: loads the reference; not called if all is in the cache.
        store: of the reference's distributions and of its floor's scores.
        floor: run the second time.
        tell: called with samples done, samples in all, and the sample's name.

    Raises:
        CheckpointError: a logit of the reference is not a number.
    """
    found: list[tuple[Distributions, Scores] | None] = [None] * len(samples)
    floors: list[Scores | None] = [None] * len(samples)
    for number, sample in enumerate(samples):
        kept = store.read(sample.sha256)
        second = store.read(f"{sample.sha256}-floor") if floor else None
        if kept is not None and (second is not None or not floor):
            found[number] = (read_distributions(kept), read_scores(kept, "own_"))
            floors[number] = None if second is None else read_scores(second)
    missing = [number for number, one in enumerate(found) if one is None]
    requests: list[tuple[int, Request]] = []
    for number in missing:
        requests.append((number, (samples[number], ATTENTION)))
        if floor:
            requests.append((number, (samples[number], OTHER_ATTENTION)))

    def take(number: int, attention: str, logits: Tensor) -> None:
        sample = samples[number]
        if attention == ATTENTION:
            made = summarise(logits, sample.targets)
            if not made.finite.all():
                raise CheckpointError(
                    f"the reference's logits of sample {sample.sample.name!r} are not finite at {int((~made.finite).sum())} "
                    f"of {len(made.finite)} positions",
                    hint="omnifp4 verify tells whether its weights are damaged; or try --dtype float32",
                )
            own = compare(made, logits, sample.targets)
            found[number] = (made, own)
            store.write(
                sample.sha256, distribution_arrays(made) | {f"own_{key}": value for key, value in vars(own).items()}
            )
        else:
            before = found[number]
            assert before is not None
            scores = compare(before[0], logits, sample.targets)
            floors[number] = scores
            store.write(f"{sample.sha256}-floor", vars(scores))

    if requests:
        _run(open_side(), requests, take, tell)
    whole = [one for one in found if one is not None]
    return ReferenceScores(
        [made for made, _ in whole], [own for _, own in whole], [one for one in floors if one is not None],
        len(samples) - len(missing),
    )  # fmt: skip


def score_model(
    samples: Sequence[EncodedSample],
    reference: ReferenceScores,
    open_side: Callable[[], Side],
    store: Store,
    *,
    tell: Tell,
) -> list[Scores]:
    """The model against the reference, sample by sample; arguments as in `score_reference`."""
    found: list[Scores | None] = [None] * len(samples)
    for number, sample in enumerate(samples):
        if (kept := store.read(sample.sha256)) is not None:
            found[number] = read_scores(kept)
    requests: list[tuple[int, Request]] = [
        (number, (samples[number], ATTENTION)) for number, one in enumerate(found) if one is None
    ]

    def take(number: int, _: str, logits: Tensor) -> None:
        scores = compare(reference.distributions[number], logits, samples[number].targets)
        found[number] = scores
        store.write(samples[number].sha256, vars(scores))

    if requests:
        _run(open_side(), requests, take, tell)
    return [one for one in found if one is not None]


def _run(
    side: Side, requests: Sequence[tuple[int, Request]], take: Callable[[int, str, Tensor], None], tell: Tell
) -> None:
    from omnifp4.evaluation.sides import WholeSide

    def on_logits(place: int, logits: Tensor) -> None:
        number, (_, attention) = part[place]
        take(number, attention, logits)

    if not isinstance(side, WholeSide):
        part = requests
        side.run([request for _, request in part], on_logits)
        return
    # The rate of what follows is not that of the loading.
    tell(0, len(requests), "loaded")
    for first in range(0, len(requests), SAMPLES_AT_ONCE):
        part = requests[first : first + SAMPLES_AT_ONCE]
        side.run([request for _, request in part], on_logits)
        tell(first + len(part), len(requests), part[-1][1][0].sample.name)


def distribution_arrays(made: Distributions) -> dict[str, Any]:
    """As a store keeps them."""
    return {key: value for key, value in vars(made).items() if value is not None}


def read_distributions(arrays: Arrays) -> Distributions:
    """What `distribution_arrays` gave to a store."""
    names = ("log_probabilities", "log_rest", "likeliest", "log_target", "finite")
    return Distributions(**{name: arrays[name] for name in names}, tokens=arrays.get("tokens"))


def read_scores(arrays: Arrays, prefix: str = "") -> Scores:
    """Scores that a store kept under names with a prefix."""
    names = ("kl", "agrees", "right", "log_target", "finite")
    return Scores(**{name: np.asarray(arrays[prefix + name]) for name in names})
