"""`run_segments`: all samples through the embeddings, then through layer after layer, then through norm and head."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from omnifp4.checkpoint.fingerprint import file_stamps, headers_sha256
from omnifp4.checkpoint.folder import Checkpoint, open_checkpoint
from omnifp4.errors import ModelError, OmniFP4Error
from omnifp4.runtime.backends import choose_backend
from omnifp4.runtime.import_hook import install
from omnifp4.segments.inputs import Inputs
from omnifp4.segments.states import States

HEAD_POSITIONS: Final = 256
"""Positions whose logits are in memory at once: 156 MB in float32 with the released vocabulary."""

AHEAD: Final = 1
"""Layers behind the one that is taken whose bytes the disk is asked for."""

SPILL_BYTES: Final = 4_000_000_000
"""Hidden states above this lie in a file."""

Progress = Callable[[int, int, str], None]
OnLogits = Callable[[int, int, Tensor], None]
OnTower = Callable[[int, str, Mapping[str, Tensor]], None]
"""Takes a sample's number, the tower's name, and the inputs ``[rows, in]`` of its linears by checkpoint name."""
OnFailure = Callable[[int, int | None, Exception], None]
"""Takes a sample's number, the layer it failed in (None: before the first), and what was raised."""


@dataclass(frozen=True, slots=True)
class SegmentedRun:
    """What a run was like.

    Attributes:
        layers: decoder layers that were run, of `layers_in_all`.
        resumed_after: layers that an earlier run had done.
        samples, tokens: that went through.
        read_bytes: of the checkpoint.
        layer_bytes: of the decoder layers among them, and `layer_seconds` from the first layer's begin to the last's end.
        waited_seconds: of these, how long the arithmetic waited for the disk.
        states_bytes: hidden states of all samples.
    """

    layers: int
    layers_in_all: int
    resumed_after: int
    samples: int
    tokens: int
    read_bytes: int
    layer_bytes: int
    layer_seconds: float
    waited_seconds: float
    states_bytes: int


def run_segments(
    checkpoint: str | Path | Checkpoint,
    batches: Sequence[Inputs],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    attention: str | Sequence[str] = "sdpa",
    backend: str = "auto",
    layers: int | None = None,
    on_layer: Callable[[Any], None] | None = None,
    on_layer_done: Callable[[int], bool] | None = None,
    on_failure: OnFailure | None = None,
    skip: Collection[int] = (),
    on_tower: OnTower | None = None,
    on_final: Callable[[int, Tensor], None] | None = None,
    positions: Sequence[Tensor] | None = None,
    on_logits: OnLogits | None = None,
    spill_bytes: int = SPILL_BYTES,
    work: Path | None = None,
    progress: Progress | None = None,
) -> SegmentedRun:
    """Run samples through a thinker whose layers are read from disk one by one.

    Memory: one decoder layer, the samples' hidden states, and one sample's activations; before the layers one tower or
    the embeddings, after them the head. The next layer's bytes are read ahead into the system's page cache. The numbers
    are bit for bit those of the same sample in the whole model, in the same dtype with the same attention.

    Args:
        checkpoint: folder or opened checkpoint of a Qwen3-Omni, wide or NVFP4; or of a model of text, such as Qwen3-MoE.
        batches: one sequence each; `omnifp4.chat.inputs.ModelInputs` will do.
        device: where the arithmetic is done.
        dtype: of the arithmetic and of wide weights.
        attention: implementation in the text decoder, for all samples or for each.
        backend: of packed weights, see `choose_backend`.
        layers: stop after so many decoder layers; norm and head are then not run.
        on_layer: called with a `LayerVisit` for every layer and sample, layer by layer.
        on_layer_done: called with a layer's number after all samples have passed it, while it is loaded. True: all pass
            it again, with what was changed in it, and this is what the next layer sees.
        on_failure: called when a sample raises in the model, or `on_layer` raises a `SampleError`; the others go on
            without it. What this callback raises ends the run. Without it the first error does.
        skip: samples that are not run.
        on_tower: called when a sample has passed a tower.
        on_final: called with a sample's number and its states behind the last norm, ``[tokens, hidden]``: what the head
            reads. It may raise a `SampleError` too.
        positions: for each sample, int64, at which positions `on_logits` gets the logits; None: at all.
        on_logits: called with the sample's number, the number of the first of these positions, and logits
            ``[positions, vocabulary]`` in `dtype`, at most `HEAD_POSITIONS` at a time.
        spill_bytes: more bytes of hidden states than this are kept in a file.
        work: folder in which a run that was killed goes on after its last whole layer. With `on_layer` too, the layers
            done before are not visited again.
        progress: called with bytes of weights used, bytes in all, and the part.

    Raises:
        OmniFP4Error: no samples, a checkpoint that is not right, or one that cannot run in segments.
    """
    install()
    from omnifp4.segments.loading import PartLoader
    from omnifp4.segments.prologue import LayerArguments, enter, moved
    from omnifp4.segments.skeleton import EMBEDDINGS, HEAD, NORM, Skeleton, layer_part
    from omnifp4.segments.visit import LayerVisit, SampleError, Watch

    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    target = torch.device(device)
    if not batches:
        raise OmniFP4Error("there are no samples to run")
    implementations = [attention] * len(batches) if isinstance(attention, str) else list(attention)
    if "quantization_config" in opened.config:
        choose_backend(target, backend)
    skeleton = Skeleton(opened, dtype=dtype, device=target)
    if layers is not None and not 1 <= layers <= skeleton.layers:
        raise ModelError(f"{opened.location} has {skeleton.layers} decoder layers, so it cannot stop after {layers}")
    last = layers if layers is not None else skeleton.layers
    wanted = layers is None and on_logits is not None
    tokens = [int(batch.tensors["input_ids"].shape[1]) for batch in batches]
    hidden = int(skeleton.text.config.hidden_size)
    key = _run_key(opened, batches, dtype, implementations) if work is not None else ""
    twice = on_layer_done is not None
    states = States(tokens, hidden, dtype, limit_bytes=spill_bytes, keep_before=twice, work=work, key=key)
    if states.done > last:
        states.done = 0
    resumed = states.done
    behind = (NORM, HEAD) if wanted else (NORM,) if layers is None and on_final is not None else ()
    names = [EMBEDDINGS, *(layer_part(number) for number in range(resumed, last)), *behind]
    total = sum(skeleton.parts[name].nbytes for name in names)
    done = 0

    def tell(name: str) -> None:
        nonlocal done
        if name in names:
            done += skeleton.parts[name].nbytes
        if progress is not None:
            progress(done, total, name)

    with torch.no_grad(), PartLoader(skeleton, opened, device=target, backend=backend) as loader:

        def keep(number: int, value: Tensor) -> None:
            if not resumed:
                states.write(number, value, 0)

        early = None if on_failure is None else (lambda sample, error: on_failure(sample, None, error))
        arguments = enter(
            skeleton, loader, batches, device=target, attention=implementations, on_part=tell, keep=keep, skip=skip,
            on_failure=early, on_tower=on_tower,
        )  # fmt: skip
        began, waited, read = time.perf_counter(), loader.waited_seconds, loader.read_bytes

        def run_layer(
            number: int, sample: int, held: LayerArguments, layer: Any
        ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
            skeleton.text.config._attn_implementation = implementations[sample]
            before, named = states.read(sample).to(target), moved(held.named, target)
            given = layer(before, **named)
            given = after = given[0] if isinstance(given, tuple) else given
            if number < len(held.added):
                at, added = moved((held.added_at, held.added[number]), target)
                after = skeleton.text._deepstack_process(after, at, added)
            return before, given, after, named

        def fail(sample: int, layer: int, error: Exception) -> None:
            if on_failure is None:
                raise error
            arguments[sample] = None
            on_failure(sample, layer, error)

        for number in range(resumed, last):
            part = skeleton.parts[layer_part(number)]
            coming = range(number, min(number + 1 + AHEAD, last))
            for other in (
                *(layer_part(one) for one in coming),
                *(behind if number + 1 == last else ()),
            ):
                loader.read_ahead(skeleton.parts[other])
            layer = loader.take(part)
            watch = Watch(part.sources if on_layer is not None else {})
            name = next(iter(part.entries)).partition(f"layers.{number}.")[0] + f"layers.{number}"
            with watch.watching():
                for sample, held in enumerate(arguments):
                    if held is None:
                        continue
                    watch.clear()
                    try:
                        before, given, after, named = run_layer(number, sample, held, layer)
                    except Exception as error:
                        fail(sample, number, error)
                        continue
                    states.write(sample, after, number + 1)
                    if on_layer is not None:
                        visit = LayerVisit(
                            number, sample, name, layer, watch.inputs, part.sources, watch.routing, before, given, after,
                            named,
                        )  # fmt: skip
                        try:
                            on_layer(visit)
                        except SampleError as error:
                            fail(sample, number, error)
            if on_layer_done is not None and on_layer_done(number):
                for sample, held in enumerate(arguments):
                    if held is not None:
                        states.write(sample, run_layer(number, sample, held, layer)[2], number + 1)
            states.passed(number + 1)
            loader.free(part, keep_memory=number + 1 < last)
            tell(part.name)
        seconds, waited = time.perf_counter() - began, loader.waited_seconds - waited
        layer_bytes = loader.read_bytes - read
        if behind:
            norm, *heads = (loader.take(skeleton.parts[name]) for name in behind)
            for sample in range(len(batches)):
                if arguments[sample] is None:
                    continue
                final = norm(states.read(sample).to(target))[0]
                if on_final is not None:
                    try:
                        on_final(sample, final)
                    except SampleError as error:
                        fail(sample, last - 1, error)
                if not heads:
                    continue
                assert on_logits is not None
                if positions is not None:
                    final = final[positions[sample].to(target)]
                for first in range(0, final.shape[0], HEAD_POSITIONS):
                    on_logits(sample, first, heads[0](final[first : first + HEAD_POSITIONS]))
            for name in behind:
                tell(name)
        return SegmentedRun(
            last, skeleton.layers, resumed, len(batches), sum(tokens), loader.read_bytes, layer_bytes, seconds, waited,
            states.nbytes,
        )  # fmt: skip


def _run_key(checkpoint: Checkpoint, batches: Sequence[Inputs], dtype: torch.dtype, attention: Sequence[str]) -> str:
    """Changes when anything changes that the states depend on."""
    digest = hashlib.sha256(headers_sha256(checkpoint).encode())
    digest.update(repr((sorted(file_stamps(checkpoint).items()), dtype, list(attention))).encode())
    for batch in batches:
        for name in sorted(batch.tensors):
            value = batch.tensors[name]
            if isinstance(value, Tensor):
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(str(batch.sound_in_video).encode())
    return digest.hexdigest()
