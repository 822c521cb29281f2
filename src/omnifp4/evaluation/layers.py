"""`--layers N`: hidden states of both sides after each of the first decoder layers, without ever running a head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.errors import CheckpointError
from omnifp4.evaluation.encoding import EncodedSample
from omnifp4.evaluation.sides import ATTENTION, OTHER_ATTENTION
from omnifp4.receipt.evaluation import LayerDifference
from omnifp4.segments import LayerVisit, run_segments
from omnifp4.segments.run import SPILL_BYTES
from omnifp4.segments.states import States

Tell = Callable[[int, int, str], None]


class _Sums:
    """Of one layer, over all samples."""

    def __init__(self) -> None:
        self.error = self.power = self.cosines = 0.0
        self.positions = self.same = self.choices = self.non_finite = 0

    def add(self, mine: Tensor, theirs: Tensor) -> None:
        """States ``[tokens, hidden]``; positions where mine are not finite are counted and left out."""
        finite = mine.isfinite().all(dim=-1)
        self.non_finite += int((~finite).sum())
        mine, theirs = mine[finite].to(torch.float64), theirs.to(mine.device)[finite].to(torch.float64)
        self.error += float((mine - theirs).square().sum())
        self.power += float(theirs.square().sum())
        self.cosines += float(torch.cosine_similarity(mine, theirs, dim=-1).sum())
        self.positions += len(mine)

    def route(self, mine: Tensor, theirs: Tensor) -> None:
        """Expert choices ``[tokens, k]``; their order does not count."""
        theirs = theirs.to(mine.device)
        self.same += int((mine[:, :, None] == theirs[:, None, :]).any(dim=-1).sum())
        self.choices += mine.numel()

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.power) if self.power else 0.0


def compare_layers(
    model: Checkpoint,
    reference: Checkpoint,
    samples: Sequence[EncodedSample],
    *,
    layers: int,
    device: torch.device,
    dtype: torch.dtype,
    floor: bool,
    tell: Tell,
) -> tuple[LayerDifference, ...]:
    """Both sides through their first layers, segment by segment.

    Args:
        model, reference: opened.
        samples: to be run.
        layers: how many.
        device, dtype: of the arithmetic.
        floor: run the reference a second time under another attention, in the same pass.
        tell: called with bytes of weights used, bytes in all, and the part.

    Raises:
        OmniFP4Error: the checkpoints have fewer layers, cannot run in segments, or the reference's states (or all of the
            model's after a layer) are no numbers.
    """
    tokens = [int(sample.tensors["input_ids"].shape[1]) for sample in samples]
    hidden = int(reference.config["thinker_config"]["text_config"]["hidden_size"])
    kept = [States(tokens, hidden, dtype, limit_bytes=SPILL_BYTES // layers) for _ in range(layers)]
    chosen: dict[tuple[int, int], Tensor] = {}
    noise = [_Sums() for _ in range(layers)]
    judged = [_Sums() for _ in range(layers)]
    count = len(samples)

    def of_reference(visit: LayerVisit) -> None:
        sample, second = visit.sample % count, visit.sample >= count
        if second:
            noise[visit.layer].add(visit.after[0], kept[visit.layer].read(sample)[0])
            return
        if not bool(visit.after.isfinite().all()):
            raise CheckpointError(
                f"{reference.location}: the reference's states of sample {samples[sample].sample.name!r} are not finite after "
                f"layer {visit.layer}",
                hint="omnifp4 verify tells whether its weights are damaged; or try --dtype float32",
            )
        kept[visit.layer].write(sample, visit.after, 0)
        if visit.routing is not None:
            chosen[visit.layer, sample] = visit.routing.experts.cpu()

    def of_model(visit: LayerVisit) -> None:
        judged[visit.layer].add(visit.after[0], kept[visit.layer].read(visit.sample)[0])
        if visit.routing is not None:
            judged[visit.layer].route(visit.routing.experts, chosen[visit.layer, visit.sample])

    runs = 2 if floor else 1
    attention = [ATTENTION] * count + [OTHER_ATTENTION] * (count * (runs - 1))
    run_segments(
        reference, [*samples] * runs, device=device, dtype=dtype, attention=attention, layers=layers,
        on_layer=of_reference, progress=lambda done, total, item: tell(done, total, f"reference, {item}"),
    )  # fmt: skip
    run_segments(
        model, samples, device=device, dtype=dtype, attention=ATTENTION, layers=layers, on_layer=of_model,
        progress=lambda done, total, item: tell(done, total, f"model, {item}"),
    )  # fmt: skip
    for number, one in enumerate(judged):
        if not one.positions:
            raise CheckpointError(
                f"{model.location}: its states are not finite at any position after layer {number}: its weights are damaged",
                hint=f"omnifp4 verify {model.location}",
            )
    return tuple(
        LayerDifference(
            layer=number,
            relative_error=one.relative_error,
            cosine=one.cosines / one.positions,
            routing_agreement=one.same / one.choices if one.choices else None,
            floor=noise[number].relative_error if floor else None,
            non_finite=one.non_finite,
        )
        for number, one in enumerate(judged)
    )
