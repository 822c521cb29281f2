"""Everything that is checked before a calibration's first weight is read: model, set, and each sample as sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from omnifp4.calibration.conversations import open_set
from omnifp4.calibration.encoding import CalibrationSequence, SequenceError, open_reader, sequences_digest
from omnifp4.calibration.failures import Failures
from omnifp4.checkpoint.folder import Checkpoint, open_checkpoint
from omnifp4.errors import OmniFP4Error
from omnifp4.evaluation.threads import suited_threads
from omnifp4.models.base import TensorSpec
from omnifp4.models.source import match_source
from omnifp4.runtime.devices import find_device

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Preparation:
    """A model and a set that go together.

    Attributes:
        checkpoint: wide.
        linears: its linear weights by checkpoint name, those of experts one by one.
        data: name of the set.
        sequences: that can be run.
        data_sha256: of these.
        failures: of those that cannot.
        left_out: conversations of a modality that the model does not read, by modality.
        device, dtype: of the run.
    """

    checkpoint: Checkpoint
    linears: Mapping[str, TensorSpec]
    data: str
    sequences: tuple[CalibrationSequence, ...]
    data_sha256: str
    failures: Failures
    left_out: Mapping[str, int]
    device: torch.device
    dtype: torch.dtype

    def bank(self, weight: str) -> str:
        """The bank of a plain linear: weights that one kernel fuses read the same input."""
        spec = self.linears[weight]
        return spec.scale_group or spec.module

    def tokens(self) -> dict[str, int]:
        """Of the sequences that did not fail, by what they are."""
        failed, counts = self.failures.names, Counter[str]()
        for one in self.sequences:
            if one.sample.name not in failed:
                counts.update(one.counts)
        return dict(counts)


def prepare(
    model: str | Path,
    data: str | Path,
    *,
    samples: int | None,
    seed: int,
    device: str,
    dtype: str,
    max_failed: float,
    progress: Progress,
) -> Preparation:
    """Check all that can be checked without running the model.

    Args:
        model: folder of a wide checkpoint.
        data: see `open_set`.
        samples: how many of it; None takes all of a set or file, and 60 of the bundled.
        seed: of that choice.
        device, dtype: as a person names them.
        max_failed: share of samples that may fail.
        progress: called with samples read, samples in all, and their names.

    Raises:
        OmniFP4Error: an argument, the checkpoint or the set is not right, or the model reads nothing of the set.
        CalibrationFailed: too many samples cannot become sequences.
    """
    if dtype not in DTYPES:
        raise OmniFP4Error(f"dtype is {dtype!r}", hint=f"allowed: {', '.join(DTYPES)}")
    target = find_device(device)
    checkpoint = open_checkpoint(Path(model).expanduser())
    linears = {one.spec.name: one.spec for one in match_source(checkpoint).tensors if one.spec.is_linear}
    reader = open_reader(checkpoint)
    chosen = open_set(data, samples=samples, seed=seed)
    read = [sample for sample in chosen.samples if sample.modality in reader.reads]
    left_out = Counter(sample.modality for sample in chosen.samples if sample.modality not in reader.reads)
    if not read:
        raise OmniFP4Error(
            f"{chosen.name}: none of its {len(chosen.samples)} conversations can be read by a "
            f"{checkpoint.config['model_type']}",
            hint=f"it reads {', '.join(sorted(reader.reads))}",
        )
    failures, sequences = Failures(len(read), max_failed), []
    with suited_threads(layer_width(checkpoint), torch.device("cpu")):
        for number, sample in enumerate(read):
            try:
                sequences.append(reader.encode(sample))
            except SequenceError as error:
                failures.add(sample.name, error.cause, error)
            progress(number + 1, len(read), sample.name)
    failures.check()
    return Preparation(
        checkpoint, linears, chosen.name, tuple(sequences), sequences_digest(sequences), failures, dict(left_out),
        target, DTYPES[dtype],
    )  # fmt: skip


def layer_width(checkpoint: Checkpoint) -> int:
    """Width of the hidden states, for choosing threads."""
    return int(_text_config(checkpoint)["hidden_size"])


def layer_count(checkpoint: Checkpoint) -> int:
    """Decoder layers."""
    return int(_text_config(checkpoint)["num_hidden_layers"])


def _text_config(checkpoint: Checkpoint) -> Any:
    config: Any = checkpoint.config
    return config.get("thinker_config", {}).get("text_config", config)
