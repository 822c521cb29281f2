"""Inputs of the talker and the code predictor, collected while known answers are spoken.

The talker reads the states of one of the thinker's layers, which the run through the layers leaves behind, and the
embeddings of text. So only the talker and that table are in memory; where even these do not fit, they stay without
statistics, and the receipt says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, Final

import torch
from torch import Tensor, nn

from omnifp4.calibration.encoding import CalibrationSequence
from omnifp4.calibration.preparation import Preparation, Progress, layer_count, layer_width
from omnifp4.calibration.record import SPEECH_PARTS
from omnifp4.calibration.running import check_finite
from omnifp4.calibration.statistics import EXPERT_WEIGHT
from omnifp4.calibration.sums import Collector
from omnifp4.chat.errors import ChatError
from omnifp4.errors import OmniFP4Error
from omnifp4.evaluation.pair import WEIGHT_ROOM, free_bytes
from omnifp4.evaluation.threads import suited_threads
from omnifp4.receipt.calibration import Cause
from omnifp4.runtime.names import Renaming

NEEDED: Final = ("talker.", "thinker.model.embed_tokens.")
TEMPERATURE: Final = 0.9
"""Of the released talker; greedy codes would tell of a few codes only."""
FRAMES_A_TOKEN: Final = 12
"""About a second, more than a word takes."""


def why_not(prepared: Preparation, wanted: bool | None) -> str:
    """Why speech is not captured; empty where it is.

    Raises:
        OmniFP4Error: it was asked for by name and cannot be.
    """
    if wanted is False:
        return "--no-speech was given"
    reason = _obstacle(prepared)
    if wanted and reason:
        raise OmniFP4Error(f"--speech was asked for: {reason}", hint="leave --speech out to go without")
    return reason


def has_talker(prepared: Preparation) -> bool:
    """Whether there is anything to capture."""
    return any(spec.component.part in SPEECH_PARTS for spec in prepared.linears.values())


def spoken(prepared: Preparation) -> list[CalibrationSequence]:
    """What is to be spoken, without the failed."""
    failed = prepared.failures.names
    return [
        one
        for one in prepared.sequences
        if one.sample.speak and one.sample.answer is not None and one.sample.name not in failed
    ]


def _obstacle(prepared: Preparation) -> str:
    if not has_talker(prepared):
        return "the checkpoint has no talker"
    if not spoken(prepared):
        return "no conversation of the set has an answer that is to be spoken (speak: true)"
    free = free_bytes(prepared.device)
    entries = [entry for name, entry in prepared.checkpoint.tensors.items() if name.startswith(NEEDED)]
    needed = sum(entry.parameters for entry in entries) * prepared.dtype.itemsize * WEIGHT_ROOM
    if free is not None and needed > free:
        return f"talker and embeddings take {needed / 1e9:.2g} GB of memory, and {prepared.device} has {free / 1e9:.2g} GB free"
    return ""


def states_layer(prepared: Preparation) -> int:
    """The number of the layer whose states the talker reads: what the model calls number k is what layer k - 1 gives.

    The number of all layers stands for what comes of the norm behind the last.
    """
    config: Any = prepared.checkpoint.config
    number, layers = int(config["talker_config"]["accept_hidden_layer"]), layer_count(prepared.checkpoint)
    return number - 1 if number < layers else layers


def capture_speech(
    prepared: Preparation, states: Mapping[str, Tensor], collector: Collector, progress: Progress
) -> None:
    """Speak the set's answers, and sum what the talker's linears and experts read.

    Args:
        prepared: failures are added to its `failures`.
        states: by the sample's name, of its prompt behind layer `states_layer`, ``[tokens, hidden]``.
        collector: gets the inputs; is not finished.
        progress: called with answers spoken, answers in all, and the name.

    Raises:
        CalibrationFailed: too many samples have failed.
    """
    from omnifp4.runtime.quantizer import mend_talker
    from omnifp4.segments.loading import PartLoader
    from omnifp4.segments.skeleton import EMBEDDINGS, TALKER, Skeleton

    skeleton = Skeleton(prepared.checkpoint, dtype=prepared.dtype, device=prepared.device, speech=True)
    model = skeleton.model
    mend_talker(model)
    chosen = [one for one in spoken(prepared) if one.sample.name in states]
    with torch.no_grad(), suited_threads(layer_width(prepared.checkpoint), prepared.device), ExitStack() as stack:
        loader = stack.enter_context(PartLoader(skeleton, prepared.checkpoint, device=prepared.device, backend="auto"))
        for part in (EMBEDDINGS, TALKER):
            loader.take(skeleton.parts[part])
        _leave_out(skeleton)
        taps = _Taps(model, skeleton.renaming, prepared)
        taps.attach(stack)
        for number, sequence in enumerate(chosen):
            taps.clear()
            try:
                _speak(model, sequence, states[sequence.sample.name], prepared.device)
                taps.check(sequence.sample.name)
            except Exception as error:
                prepared.failures.add(sequence.sample.name, _cause(error), error)
                prepared.failures.check()
                continue
            taps.give(collector)
            progress(number + 1, len(chosen), f"speaking {sequence.sample.name}")
        taps.clear()
        collector.finish()


def _leave_out(skeleton: Any) -> None:
    """Take the thinker's other parts away: a model's device is that of its first parameter, and these are on none."""
    skeleton.towers.audio_tower, skeleton.towers.visual = nn.Identity(), nn.Identity()
    skeleton.text.layers, skeleton.text.norm = nn.ModuleList(), nn.Identity()
    skeleton.thinker.lm_head = nn.Identity()


def _cause(error: Exception) -> Cause:
    if isinstance(error, ChatError):
        return Cause.PROMPT
    # The engine itself refuses codes that come of NaN.
    return Cause.NUMBERS if isinstance(error, OmniFP4Error) else Cause.FORWARD


def _speak(model: Any, sequence: CalibrationSequence, states: Tensor, device: torch.device) -> None:
    """Talker and code predictor over one known answer, through Transformers' modules: hooks see calls of those only."""
    from omnifp4.chat.speech import choose_speaker
    from omnifp4.decoding.model_lock import model_lock
    from omnifp4.decoding.speech_engine import engine_for
    from omnifp4.decoding.speech_sampling import CodeSampling
    from omnifp4.decoding.talker_opening import assemble, written_text

    count = sequence.prompt_tokens
    tensors = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in sequence.tensors.items()
    }
    answer = tuple(tensors["input_ids"][0, count:-1].tolist())
    for name in ("input_ids", "attention_mask"):
        tensors[name] = tensors[name][:, :count]
    end = model.config.im_end_token_id
    with model_lock(model):
        written = written_text(model, tensors["input_ids"], states[None].to(device, model.dtype), answer, end)
        opening = assemble(
            model, tensors, written, eos=end, speaker=choose_speaker(model, True),
            sound_in_video=sequence.sound_in_video,
        )  # fmt: skip
        sampling = CodeSampling(
            greedy=False, temperature=TEMPERATURE, top_k=opening.top_k, top_p=opening.top_p,
            repetition_penalty=opening.repetition_penalty,
        )  # fmt: skip
        most = FRAMES_A_TOKEN * (2 + len(answer))
        with closing(engine_for(model.talker, "modules").frames(opening, sampling, seed=0, most_frames=most)) as frames:
            for _ in frames:
                pass


class _Taps:
    """Keeps what the talker's modules read during one answer."""

    def __init__(self, model: Any, renaming: Renaming, prepared: Preparation) -> None:
        self._weights: dict[str, tuple[str, ...]] = {}
        self._linears: dict[str, nn.Module] = {}
        self._experts: dict[str, nn.Module] = {}
        self._inputs: dict[str, list[Tensor]] = {}
        self._chosen: dict[str, list[Tensor]] = {}
        for weight, spec in prepared.linears.items():
            if spec.component.part not in SPEECH_PARTS:
                continue
            if match := EXPERT_WEIGHT.fullmatch(weight):
                name = match["experts"]
                if name not in self._experts:
                    path = renaming.target(f"{name}.gate_up_proj").removesuffix(".gate_up_proj")
                    self._experts[name] = model.get_submodule(path)
                continue
            module = model.get_submodule(renaming.target(weight).removesuffix(".weight"))
            if isinstance(module, nn.Linear):
                bank = prepared.bank(weight)
                self._linears.setdefault(bank, module)
                self._weights[bank] = (*self._weights.get(bank, ()), weight)

    def attach(self, stack: ExitStack) -> None:
        """Hook the modules until the stack is closed."""
        for named, hook in ((self._linears, self._keep), (self._experts, self._keep_experts)):
            for name, module in named.items():
                stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)

    def clear(self) -> None:
        """Forget the last answer."""
        self._inputs, self._chosen = {}, {}

    def check(self, name: str) -> None:
        """Refuse an answer with Inf or NaN on its way."""
        check_finite({key: torch.cat(parts) for key, parts in self._inputs.items()}, None, f"speech of {name!r}")

    def give(self, collector: Collector) -> None:
        """Add one answer's inputs to the sums."""
        for name, parts in self._inputs.items():
            if name in self._experts:
                collector.add_experts(name, self._experts[name], torch.cat(parts), torch.cat(self._chosen[name]))
            else:
                collector.add_linear(name, self._weights[name], torch.cat(parts))

    def _keep(self, name: str) -> Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], None]:
        def keep(_: nn.Module, values: Sequence[Any], named: Mapping[str, Any]) -> None:
            x = values[0] if values else next(value for value in named.values() if isinstance(value, Tensor))
            self._inputs.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]))

        return keep

    def _keep_experts(self, name: str) -> Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], None]:
        keep_inputs = self._keep(name)

        def keep(module: nn.Module, values: Sequence[Any], named: Mapping[str, Any]) -> None:
            keep_inputs(module, values, named)
            self._chosen.setdefault(name, []).append(values[1] if len(values) > 1 else named["top_k_index"])

        return keep
