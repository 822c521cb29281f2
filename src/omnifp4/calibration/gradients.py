"""Squared gradients of every weight of a thinker, in two factors a weight: by output and by input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from omnifp4.calibration.encoding import CalibrationSequence
from omnifp4.calibration.preparation import Preparation, Progress, layer_width
from omnifp4.calibration.statistics import gradient_names
from omnifp4.evaluation.threads import suited_threads
from omnifp4.segments.gradients import Squares, run_gradients


def collect_gradients(prepared: Preparation, *, seed: int, progress: Progress) -> tuple[dict[str, Tensor], int]:
    """Run the samples that did not fail forward and back.

    Args:
        prepared: model and set.
        seed: of the signs, see `run_gradients`.
        progress: called with bytes of weights used, bytes in all, and the part.

    Returns:
        Sums of squares over inputs (``rows``) and over outputs (``columns``) of each weight, by their names in the
        statistics file, float32 ``[1, out]`` and ``[1, in]``, of experts ``[experts, …]``; and how many positions they are of.

    Raises:
        OmniFP4Error: as `run_gradients`.
    """
    found: dict[str, Tensor] = {}

    def on_layer(_: int, modules: Mapping[str, nn.Module], squares: Squares) -> None:
        for name, parameters in squares.items():
            if f"{name}.weight" in prepared.linears:
                _keep(found, name, parameters["weight"][None])
            elif name.endswith(".experts"):
                gate, up = parameters["gate_up_proj"].chunk(2, dim=1)
                for part, sums in (("gate_proj", gate), ("up_proj", up), ("down_proj", parameters["down_proj"])):
                    _keep(found, f"{name}.{part}", sums)

    names = prepared.failures.names
    with suited_threads(layer_width(prepared.checkpoint), prepared.device):
        count = run_gradients(
            prepared.checkpoint, prepared.sequences, [answer_positions(one) for one in prepared.sequences], on_layer,
            device=prepared.device, dtype=prepared.dtype, seed=seed,
            skip=[number for number, one in enumerate(prepared.sequences) if one.sample.name in names],
            progress=lambda done, total, item: progress(done, total, f"gradients, {item}"),
        )  # fmt: skip
    return found, count


def answer_positions(sequence: CalibrationSequence) -> Tensor:
    """Where the next token is one of the answer, as `evaluate` scores them; all positions where there is no answer."""
    length = int(sequence.tensors["input_ids"].shape[1])
    first = sequence.prompt_tokens - 1 if sequence.prompt_tokens < length else 0
    return torch.arange(first, length - 1)


def _keep(found: dict[str, Tensor], name: str, sums: Tensor) -> None:
    rows, columns = gradient_names(name)
    found[rows], found[columns] = sums.sum(dim=2).cpu(), sums.sum(dim=1).cpu()
