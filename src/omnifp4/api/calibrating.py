"""Verbs that prepare for recipes which look at inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omnifp4.receipt.calibration import CalibrationReceipt, SetReceipt

Progress = Callable[[int, int, str], None]


def dataset(
    out: str | Path,
    *,
    source: str | Path = "bundled",
    samples: int | None = None,
    modalities: Iterable[str] = (),
    model: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SetReceipt:
    """Make a calibration set: conversations with their media in the new folder `out`.

    Args:
        out: must not exist; it appears only when it is whole.
        source: ``"bundled"``, or a JSONL file of conversations as `evaluate` takes it.
        samples: how many, evenly over modalities; 60 if not given, or all where a file has fewer.
        modalities: only these of ``text``, ``image``, ``audio``, ``video``, ``mixed``; all if none is given.
        model: whose processor checks every conversation and counts tokens; the bundled tiny model's if not given. A
            Hub id is downloaded first, weights too, as `calibrate` needs them.
        seed: of the choice.
        progress: called with conversations read, conversations in all, and the name.

    Raises:
        OmniFP4Error: the source is not right, or a conversation cannot be read.
    """
    from omnifp4.calibration.conversations import make_set
    from omnifp4.calibration.encoding import bundled_reader, open_reader
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.checkpoint.hub import local_folder
    from omnifp4.checkpoint.staging import refuse_existing

    refuse_existing(Path(out))
    reader = bundled_reader() if model is None else open_reader(open_checkpoint(local_folder(str(model))))
    return make_set(
        Path(out),
        source=source,
        samples=samples,
        modalities=tuple(modalities),
        seed=seed,
        reader=reader,
        progress=progress or (lambda *_: None),
    )


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path = "bundled",
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "bfloat16",
    max_failed: float = 0.05,
    least_tokens: int = 64,
    all_expert_tokens: int = 2048,
    block_hessians: bool = True,
    speech: bool | None = None,
    gradients: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> CalibrationReceipt:
    """Collect statistics of what every linear and expert reads, layer by layer from disk, in the new file `out`.

    Args:
        model: a wide checkpoint's folder, or a Hub id, which is downloaded first.
        out: must not exist; it appears only when it is whole.
        data: what `dataset` made, a JSONL file, or ``"bundled"``.
        samples: only so many of it, evenly over modalities.
        seed: of that choice.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` …
        dtype: ``"bfloat16"`` or ``"float32"``.
        max_failed: share of samples that may fail.
        least_tokens: an expert with fewer routed tokens takes the all-expert statistics.
        all_expert_tokens: that every expert gets beside its own; 0 leaves it at its own.
        block_hessians: collect products within blocks of 16 inputs.
        speech: capture talker and code predictor; None: where the talker fits into memory.
        gradients: collect squared gradients of the thinker's weights too, for a budget that chooses by them.
        resume: go on with what an interrupted run left in ``OUT.partial``.
        progress: called with work done, work in all, and what it is.

    Raises:
        OmniFP4Error: anything about arguments, model, set or disk that is not right.
        CalibrationFailed: too many samples failed; nothing is written.
    """
    from omnifp4.calibration.capture import CaptureSettings, run_capture
    from omnifp4.checkpoint.hub import local_folder

    settings = CaptureSettings(
        samples=samples,
        seed=seed,
        device=device,
        dtype=dtype,
        max_failed=max_failed,
        least_tokens=least_tokens,
        all_expert_tokens=all_expert_tokens,
        block_hessians=block_hessians,
        speech=speech,
        gradients=gradients,
        resume=resume,
    )
    return run_capture(local_folder(str(model)), Path(out), data, settings, progress or (lambda *_: None))
