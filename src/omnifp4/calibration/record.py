"""The receipt of a calibration."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from omnifp4.calibration.fingerprint import model_fingerprint
from omnifp4.calibration.preparation import Preparation
from omnifp4.calibration.statistics import EXPERT_WEIGHT
from omnifp4.evaluation.devices import name_of_device
from omnifp4.models.base import Kind, Part
from omnifp4.receipt.base import as_text, this_environment
from omnifp4.receipt.calibration import CalibrationReceipt, ExpertTokens

UNREACHED: Final = "no conversation of the set reached it"
NOT_VISITED: Final = "only decoder layers of the thinker are visited"
NO_SOUND: Final = "codes are made, and no sound of them"
SPEECH_PARTS: Final = (Part.TALKER, Part.CODE_PREDICTOR)


def expert_tokens(name: str, tokens: Sequence[int], all_expert: Sequence[int], least: int) -> ExpertTokens:
    """How one group's experts were reached.

    Args:
        name: of the group.
        tokens: routed to each.
        all_expert: of the all-expert statistics of each; empty without them.
        least: fewer routed tokens are too few.
    """
    too_few = [number for number, count in enumerate(tokens) if count < least]
    return ExpertTokens(
        experts=name,
        tokens=tuple(tokens),
        all_expert_tokens=max(all_expert, default=0),
        too_few=len(too_few),
        data_free=sum(not all_expert or all_expert[number] < least for number in too_few),
    )


def components(
    prepared: Preparation,
    weights: Collection[str],
    experts: Collection[str],
    *,
    silent: str,
    otherwise: str = UNREACHED,
) -> tuple[dict[str, int], dict[str, str]]:
    """Components with statistics and how many linears, and components without, and why.

    Args:
        prepared: the model.
        weights: plain linears that have statistics.
        experts: groups that have.
        silent: why talker and code predictor have none; empty if they have.
        otherwise: why others have none.
    """
    captured: Counter[str] = Counter()
    missing: dict[str, str] = {}
    for weight, spec in prepared.linears.items():
        match = EXPERT_WEIGHT.fullmatch(weight)
        if weight in weights or (match is not None and match["experts"] in experts):
            captured[spec.component.name] += 1
        elif spec.component.kind is not Kind.ROUTER:
            part = spec.component.part
            reason = silent if silent and part in SPEECH_PARTS else NO_SOUND if part is Part.CODE2WAV else otherwise
            missing[spec.component.name] = reason
    return dict(captured), {name: reason for name, reason in missing.items() if name not in captured}


def calibration_receipt(
    prepared: Preparation,
    *,
    least_tokens: int,
    experts: tuple[ExpertTokens, ...],
    captured: dict[str, int],
    missing: dict[str, str],
    block_hessians: bool,
    tensors: Mapping[str, int],
    resumed: int,
    begin: float,
    gradient_positions: int = 0,
) -> CalibrationReceipt:
    """The record of a run.

    Args:
        prepared: model, set and failures.
        least_tokens, block_hessians: settings.
        experts, captured, missing: of `expert_tokens` and `components`.
        tensors: checksums of the file's tensors.
        resumed: layers that an earlier run had done.
        begin: `time.monotonic` when the run began.
        gradient_positions: that squared gradients are of.
    """
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return CalibrationReceipt(
        model=as_text(Path(prepared.checkpoint.location).name),
        model_type=str(prepared.checkpoint.config["model_type"]),
        model_fingerprint=model_fingerprint(prepared.checkpoint),
        data=prepared.data,
        data_sha256=prepared.data_sha256,
        samples=prepared.failures.samples,
        failures=tuple(prepared.failures.found),
        left_out=dict(prepared.left_out),
        tokens=prepared.tokens(),
        least_tokens=least_tokens,
        experts=experts,
        components=captured,
        not_captured=missing,
        block_hessians=block_hessians,
        dtype=str(prepared.dtype).removeprefix("torch."),
        device=name_of_device(prepared.device),
        tensors=dict(tensors),
        resumed_layers=resumed,
        seconds=time.monotonic() - begin,
        peak_memory_bytes=used if sys.platform == "darwin" else used * 1024,
        environment=this_environment(),
        gradient_positions=gradient_positions,
    )
