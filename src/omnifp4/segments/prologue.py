"""What comes before the first decoder layer: towers, then embeddings, each loaded, run over all samples, and freed.

The stock forward does it all. In the towers' turn their outputs are kept; in the embeddings' turn the towers give these
out again, and the forward is ended where it would enter the first layer, whose arguments are what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from omnifp4.errors import CheckpointError
from omnifp4.segments.inputs import Inputs, thinker_arguments
from omnifp4.segments.loading import PartLoader
from omnifp4.segments.skeleton import AUDIO, EMBEDDINGS, VISION, Skeleton
from omnifp4.segments.visit import Watch

HOST: Final = torch.device("cpu")

OnTower = Callable[[int, str, Mapping[str, Tensor]], None]


@dataclass(slots=True)
class LayerArguments:
    """What a sample needs in every layer beside its states; on the host.

    Attributes:
        named: keyword arguments of a decoder layer.
        added: features of pictures that are added behind the first layers.
        added_at: where, bool ``(1, tokens)``.
    """

    named: dict[str, Any]
    added: Sequence[Tensor]
    added_at: Tensor | None


class _Entered(Exception):
    """The forward has come to the first layer."""


class _Replay:
    """Keeps what a tower gave, and gives it again."""

    def __init__(self, tower: nn.Module, device: torch.device) -> None:
        self._tower, self._device = tower, device
        self._outputs: list[Any] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        forward = self._tower.forward

        def record(*values: Any, **named: Any) -> Any:
            output = forward(*values, **named)
            self._outputs.append(moved(output, HOST))
            return output

        with _replaced(self._tower, record):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        outputs = iter(self._outputs)
        with _replaced(self._tower, lambda *_, **__: moved(next(outputs), self._device)):
            yield


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def moved(value: Any, device: torch.device) -> Any:
    """A copy of nested tensors on a device; what holds them is new, so that changing one changes no other."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return type(value)(**{key: moved(item, device) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return value


def enter(
    skeleton: Skeleton,
    loader: PartLoader,
    batches: Sequence[Inputs],
    *,
    device: torch.device,
    attention: Sequence[str],
    on_part: Callable[[str], None],
    keep: Callable[[int, Tensor], None],
    skip: Collection[int] = (),
    on_failure: Callable[[int, Exception], None] | None = None,
    on_tower: OnTower | None = None,
) -> list[LayerArguments | None]:
    """Runs towers and embeddings over all samples.

    Args:
        skeleton, loader: of the checkpoint.
        batches: samples.
        device: where to run.
        attention: implementation in the text decoder, for each sample.
        on_part: called when a part is done.
        keep: takes each sample's states before the first layer.
        skip: samples that are not run; they get None.
        on_failure: called with the number of a sample that raised, and what; it then gets None too. Without it the first
            error ends the run.
        on_tower: see `run_segments`.

    Raises:
        CheckpointError: a sample needs a tower that the checkpoint lacks.
    """
    failed = set(skip)

    def fail(number: int, error: Exception) -> None:
        if on_failure is None:
            raise error
        failed.add(number)
        on_failure(number, error)

    replays = _run_towers(skeleton, loader, batches, device, on_part, failed, fail, on_tower)
    part = skeleton.parts[EMBEDDINGS]
    loader.take(part)
    found: list[LayerArguments | None] = [None] * len(batches)
    with torch.no_grad():
        for number, batch in enumerate(batches):
            if number in failed:
                continue
            skeleton.text.config._attn_implementation = attention[number]
            try:
                arguments = thinker_arguments(skeleton.thinker, batch, device)
                states, held = _first_arguments(skeleton, arguments, replays.get(number, ()))
            except Exception as error:
                fail(number, error)
                continue
            keep(number, states)
            found[number] = held
    loader.free(part)
    on_part(EMBEDDINGS)
    return found


_TOWERS: Final = (
    (AUDIO, "audio_tower", (("input_features", "get_audio_features", ("feature_attention_mask",)),)),
    (
        VISION,
        "visual",
        (
            ("pixel_values", "get_image_features", ("image_grid_thw",)),
            ("pixel_values_videos", "get_video_features", ("video_grid_thw",)),
        ),
    ),
)
"""Parts, the tower's attribute, and in the order of the stock forward: what a sample has, the method that reads it, and
the method's other arguments."""


def _run_towers(
    skeleton: Skeleton,
    loader: PartLoader,
    batches: Sequence[Inputs],
    device: torch.device,
    on_part: Callable[[str], None],
    failed: Set[int],
    fail: Callable[[int, Exception], None],
    on_tower: OnTower | None,
) -> dict[int, list[_Replay]]:
    replays: dict[int, list[_Replay]] = {}
    for part_name, attribute, methods in _TOWERS:
        keys = [key for key, _, _ in methods]
        chosen = [
            number
            for number, batch in enumerate(batches)
            if number not in failed and any(batch.tensors.get(key) is not None for key in keys)
        ]
        if not chosen:
            continue
        part = skeleton.parts[part_name]
        if not part.entries:
            raise CheckpointError(f"a sample needs the {part_name}, and the checkpoint has no tensor of it")
        loader.take(part)
        tower = getattr(skeleton.towers, attribute)
        watch = Watch(part.sources if on_tower is not None else {})
        with torch.no_grad(), watch.watching():
            for number in chosen:
                watch.clear()
                replay = _Replay(tower, device)
                try:
                    arguments = thinker_arguments(skeleton.thinker, batches[number], device)
                    with replay.recording():
                        for key, method, others in methods:
                            if arguments.get(key) is not None:
                                named = {name: arguments.get(name) for name in others}
                                getattr(skeleton.towers, method)(arguments[key], **named, return_dict=True)
                    if on_tower is not None:
                        on_tower(number, part_name, watch.inputs)
                except Exception as error:
                    fail(number, error)
                    continue
                replays.setdefault(number, []).append(replay)
        loader.free(part)
        on_part(part_name)
    return replays


def _first_arguments(
    skeleton: Skeleton, arguments: dict[str, Any], replays: Sequence[_Replay]
) -> tuple[Tensor, LayerArguments]:
    from contextlib import ExitStack

    caught: dict[str, Any] = {}

    def of_text(_: nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught["added"] = named.get("deepstack_visual_embeds")
        caught["added_at"] = named.get("visual_pos_masks")

    def of_layer(_: nn.Module, values: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught["states"] = values[0] if values else named["hidden_states"]
        caught["named"] = {key: value for key, value in named.items() if key != "hidden_states"}
        raise _Entered

    with ExitStack() as stack:
        for replay in replays:
            stack.enter_context(replay.replaying())
        stack.callback(skeleton.text.register_forward_pre_hook(of_text, with_kwargs=True).remove)
        stack.callback(skeleton.text.layers[0].register_forward_pre_hook(of_layer, with_kwargs=True).remove)
        try:
            skeleton.thinker(**arguments)
        except _Entered:
            pass
        else:
            raise RuntimeError("the thinker's forward did not enter its first decoder layer")
    added = caught["added"] if caught["added"] is not None else ()
    at = caught["added_at"]
    held = LayerArguments(moved(caught["named"], HOST), moved(tuple(added), HOST), None if at is None else at.to(HOST))
    return caught["states"], held
