"""`run_gradients`: how much the likelihood of what a model says depends on each weight, layer by layer from disk.

All samples go forward through the layers, and what each layer read is kept. Then head and layers come again from disk in
reverse order, each is run once more, and the gradient goes back through it: one layer with its gradients is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.errors import ModelError, OmniFP4Error
from omnifp4.runtime.import_hook import install
from omnifp4.segments.inputs import Inputs
from omnifp4.segments.run import HEAD_POSITIONS, SPILL_BYTES, Progress
from omnifp4.segments.states import States

Squares = Mapping[str, Mapping[str, Tensor]]
"""By checkpoint name of a linear or of the experts of a layer, and by the module's parameter: float32, shaped like it."""

ATTENTION: Final = "sdpa"


def run_gradients(
    checkpoint: Checkpoint,
    batches: Sequence[Inputs],
    positions: Sequence[Tensor],
    on_layer: Callable[[int, Mapping[str, nn.Module], Squares], None],
    *,
    device: torch.device,
    dtype: torch.dtype,
    skip: Collection[int] = (),
    seed: int = 0,
    spill_bytes: int = SPILL_BYTES,
    progress: Progress | None = None,
) -> int:
    """Sums of squared gradients of every decoder layer's linears and experts, last layer first.

    What is squared is the gradient of ``sum u z`` over a sample's positions, with logits ``z`` and random signs ``v`` in
    ``u = sqrt(p) v - p (sqrt(p) . v)``: the mean of ``u u'`` over signs is ``diag(p) - p p'``, the second derivative of the
    divergence by the logits. So half the sum of squares times squared changes of weights estimates the divergence that
    these changes cause (the diagonal of the Gauss-Newton matrix, after Martens, "New insights and perspectives on the
    natural gradient method", 2020), without the chance of a rare token to be drawn that labels drawn from ``p`` have.

    Memory: one decoder layer, its gradients in `dtype` and their squares in float32; what each layer read, for all samples
    (layers times tokens times hidden), above `spill_bytes` in files.

    Args:
        checkpoint: wide, with a head of its own.
        batches: one sequence each.
        positions: int64, of each sample, whose next token counts.
        on_layer: called with a layer's number, its modules by checkpoint name, and the squares of their parameters.
        device, dtype: of the arithmetic.
        skip: samples that are not run.
        seed: of the signs.
        spill_bytes: see above.
        progress: called with bytes of weights used, bytes in all, and the part.

    Returns:
        Positions that were summed over.

    Raises:
        ModelError: the checkpoint is packed, or its head is its embedding.
        OmniFP4Error: there are no samples, or a gradient is not finite.
    """
    install()
    from omnifp4.segments.loading import PartLoader
    from omnifp4.segments.prologue import LayerArguments, enter, moved
    from omnifp4.segments.skeleton import EMBEDDINGS, HEAD, NORM, Skeleton, layer_part

    if "quantization_config" in checkpoint.config:
        raise ModelError(f"{checkpoint.location}: is quantized; gradients are of the wide checkpoint")
    refuse_without_head(checkpoint)
    skeleton = Skeleton(checkpoint, dtype=dtype, device=device)
    count = skeleton.layers
    tokens = [int(batch.tensors["input_ids"].shape[1]) for batch in batches]
    hidden = int(skeleton.text.config.hidden_size)
    names = [EMBEDDINGS, *(layer_part(number) for number in range(count)), NORM, HEAD]
    names += [layer_part(number) for number in reversed(range(count))]
    total, done = sum(skeleton.parts[name].nbytes for name in names), 0

    def tell(name: str) -> None:
        nonlocal done
        if name in names:
            done += skeleton.parts[name].nbytes
        if progress is not None:
            progress(done, total, name)

    read_by = [States(tokens, hidden, dtype, limit_bytes=spill_bytes // (count + 1)) for _ in range(count + 1)]
    with PartLoader(skeleton, checkpoint, device=device, backend="auto") as loader:
        arguments = enter(
            skeleton, loader, batches, device=device, attention=[ATTENTION] * len(batches), on_part=tell,
            keep=lambda sample, value: read_by[0].write(sample, value, 0), skip=skip,
        )  # fmt: skip
        chosen = [(sample, held) for sample, held in enumerate(arguments) if held is not None]
        if not chosen:
            raise OmniFP4Error("there are no samples to take gradients of")
        skeleton.text.config._attn_implementation = ATTENTION

        def through(number: int, held: LayerArguments, layer: nn.Module, before: Tensor) -> Tensor:
            given = layer(before, **moved(held.named, device))
            after: Tensor = given[0] if isinstance(given, tuple) else given
            if number < len(held.added):
                at, added = moved((held.added_at, held.added[number]), device)
                after = skeleton.text._deepstack_process(after, at, added)
            return after

        for number in range(count):
            part = skeleton.parts[layer_part(number)]
            loader.read_ahead(part)
            layer = loader.take(part)
            with torch.no_grad():
                for sample, held in chosen:
                    after = through(number, held, layer, read_by[number].read(sample).to(device))
                    read_by[number + 1].write(sample, after, 0)
            loader.free(part, keep_memory=number + 1 < count)
            tell(part.name)

        norm, head = (loader.take(skeleton.parts[name]) for name in (NORM, HEAD))
        generator = torch.Generator(device).manual_seed(seed)
        back: dict[int, Tensor] = {}
        for sample, _ in chosen:
            final = read_by[count].read(sample).to(device).requires_grad_()
            states = norm(final)[0][positions[sample].to(device)]
            for first in range(0, len(states), HEAD_POSITIONS):
                logits = head(states[first : first + HEAD_POSITIONS]).float()
                weighted = (logits * signed(logits.detach(), generator)).sum()
                torch.autograd.backward([weighted], retain_graph=True)
            back[sample] = _gradient(final, f"sample {sample} behind the last layer")
        for name in (NORM, HEAD):
            loader.free(skeleton.parts[name])
            tell(name)

        for number in reversed(range(count)):
            part = skeleton.parts[layer_part(number)]
            layer = loader.take(part)
            squares = _zeros(part.sources)
            for sample, held in chosen:
                before = read_by[number].read(sample).to(device).requires_grad_()
                torch.autograd.backward([through(number, held, layer, before)], [back[sample]])
                back[sample] = _gradient(before, f"sample {sample} in layer {number}")
                _add_squares(part.sources, squares)
            read_by.pop()
            on_layer(number, part.sources, squares)
            loader.free(part)
            tell(part.name)
    return sum(len(positions[sample]) for sample, _ in chosen)


def refuse_without_head(checkpoint: Checkpoint) -> None:
    """Raise ModelError for a model whose head is its embedding; told before any of the work."""
    from omnifp4.segments.skeleton import HEAD, part_of

    if not any(part_of(name) == HEAD for name in checkpoint.tensors):
        raise ModelError(
            f"{checkpoint.location}: has no head of its own, so its gradients are not collected here",
            hint="leave --gradients out",
        )


def signed(logits: Tensor, generator: torch.Generator) -> Tensor:
    """``sqrt(p) v - p (sqrt(p) . v)`` with random signs ``v``.

    Args:
        logits: float32 ``[positions, vocabulary]``.
        generator: of the signs, on the device of the logits: a vocabulary's signs for every position are many.
    """
    share = logits.softmax(dim=-1)
    signs = (
        torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8, device=logits.device).to(logits) * 2
        - 1
    )
    root = share.sqrt() * signs
    return root - share * root.sum(dim=-1, keepdim=True)


def _zeros(sources: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, module in sources.items():
        parameters = {key: value for key, value in module.named_parameters(recurse=False) if value.ndim > 1}
        for value in parameters.values():
            value.requires_grad_()
        found[name] = {key: torch.zeros_like(value, dtype=torch.float32) for key, value in parameters.items()}
    return found


def _add_squares(sources: Mapping[str, nn.Module], squares: Squares) -> None:
    for name, module in sources.items():
        for key, total in squares[name].items():
            value = module.get_parameter(key)
            # A layer that a sample passes by has none.
            if value.grad is not None:
                # One expert after the other: all of them in float32 would be half as much again as the layer's squares.
                for into, one in zip(total, value.grad, strict=True) if value.ndim == 3 else ((total, value.grad),):
                    into.add_(one.float().square_())
                value.grad = None


def _gradient(value: Tensor, where: str) -> Tensor:
    gradient = value.grad
    assert gradient is not None
    if not bool(gradient.isfinite().all()):
        raise OmniFP4Error(f"gradient of {where} is not finite", hint="--dtype float32, or leave --gradients out")
    return gradient
