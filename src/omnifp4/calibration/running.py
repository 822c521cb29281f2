"""A prepared set through a model, layer by layer; samples that fail are left behind and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from omnifp4.calibration.preparation import Preparation, Progress, layer_width
from omnifp4.evaluation.threads import suited_threads
from omnifp4.receipt.calibration import Cause
from omnifp4.segments import SampleError, SegmentedRun, run_segments


class NotFinite(SampleError):
    """Activations hold Inf or NaN."""


def run_layers(
    prepared: Preparation,
    *,
    on_layer: Callable[[Any], None],
    on_layer_done: Callable[[int], bool],
    on_tower: Callable[[int, str, Mapping[str, Tensor]], None] | None = None,
    on_final: Callable[[int, Tensor], None] | None = None,
    work: Path | None,
    progress: Progress,
) -> SegmentedRun:
    """Run the decoder layers.

    Args:
        prepared: model and set; failures are added to its `failures`.
        on_layer, on_layer_done, on_tower, on_final: see `run_segments`; all tensors are finite.
        work: folder of a run that can go on after it was killed.
        progress: called with bytes of weights used, bytes in all, and the part.

    Raises:
        CalibrationFailed: as soon as too many samples have failed.
    """
    failures, names = prepared.failures, [one.sample.name for one in prepared.sequences]
    known = failures.names

    def fail(sample: int, layer: int | None, error: Exception) -> None:
        cause = Cause.NUMBERS if isinstance(error, NotFinite) else Cause.FORWARD
        failures.add(names[sample], cause, error, layer)
        failures.check()

    def visit(one: Any) -> None:
        try:
            check_finite(one.inputs, one.after, f"layer {one.layer}")
        except NotFinite as error:
            if damaged := damaged_weight(one):
                raise NotFinite(f"{error}; weight {damaged!r} holds NaN or infinite values") from None
            raise
        on_layer(one)

    def tower(sample: int, name: str, inputs: Mapping[str, Tensor]) -> None:
        assert on_tower is not None
        check_finite(inputs, None, name)
        on_tower(sample, name, inputs)

    def final(sample: int, states: Tensor) -> None:
        assert on_final is not None
        check_finite({"the head": states}, None, "behind the last norm")
        on_final(sample, states)

    with suited_threads(layer_width(prepared.checkpoint), prepared.device):
        return run_segments(
            prepared.checkpoint,
            prepared.sequences,
            device=prepared.device,
            dtype=prepared.dtype,
            on_layer=visit,
            on_layer_done=on_layer_done,
            on_failure=fail,
            on_tower=None if on_tower is None else tower,
            on_final=None if on_final is None else final,
            skip=[number for number, name in enumerate(names) if name in known],
            work=work,
            progress=progress,
        )


def check_finite(inputs: Mapping[str, Tensor], after: Tensor | None, where: str) -> None:
    """Refuse a sample with Inf or NaN in a layer.

    Args:
        inputs: of linears and experts, by checkpoint name, ``[tokens, in]``.
        after: states behind the layer, ``(1, tokens, hidden)``.
        where: for the message.

    Raises:
        NotFinite: naming the input and the first token.
    """
    behind = {} if after is None else {"what leaves the layer": after[0]}
    for name, value in ({**inputs} | behind).items():
        finite = value.isfinite().all(dim=-1)
        if not bool(finite.all()):
            token = int((~finite).nonzero()[0, 0])
            what = name if name in behind else f"the input of {name!r}"
            raise NotFinite(f"{where}: {what} is not finite, first at token {token}")


def damaged_weight(visit: Any) -> str:
    """The checkpoint name of the first weight of a layer that holds Inf or NaN; empty if all are finite.

    Args:
        visit: a `LayerVisit`.
    """
    for name, parameter in visit.module.named_parameters():
        if bool(parameter.isfinite().all()):
            continue
        experts, _, part = name.rpartition(".")
        if parameter.ndim < 3:
            return f"{visit.name}.{name}"
        finite = parameter.isfinite()
        number = int((~finite.flatten(1).all(dim=1)).nonzero()[0, 0])
        if part == "gate_up_proj":
            part = "up_proj" if bool(finite[number].chunk(2)[0].all()) else "gate_proj"
        return f"{visit.name}.{experts}.{number}.{part}.weight"
    return ""
