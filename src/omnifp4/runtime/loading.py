"""`load`: a checkpoint into Transformers, with checks first, progress meanwhile, and a watch for stalls."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from omnifp4.checkpoint.artifact import find_claims, find_coded, find_linears
from omnifp4.checkpoint.folder import LEGACY_QUANT_CONFIG_NAME, Checkpoint, open_checkpoint
from omnifp4.checkpoint.hub import local_folder
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError, ModelError, OmniFP4Error
from omnifp4.runtime.backends import choose_backend
from omnifp4.runtime.devices import find_device
from omnifp4.runtime.names import OPTIONAL_PARTS
from omnifp4.runtime.options import LoadOptions, loading_with
from omnifp4.runtime.placement import tensors_of
from omnifp4.runtime.progress import STALL_SECONDS, LoadProgress
from omnifp4.runtime.quantizer import check_dtype, mend_talker, tell_once
from omnifp4.runtime.stall import available_bytes
from omnifp4.runtime.torchvision_on_cpu import declare_missing_operators
from omnifp4.runtime.wide_tensors import wide_tensors

CLASSES: Final = {
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
"""The class to load where the config names none; other types are causal language models."""

GENERATION_CONFIG_NAME: Final = "generation_config.json"

Progress = Callable[[int, int, str], None]


def load(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    speech: bool = True,
    backend: str = "auto",
    progress: bool | Progress | None = None,
    stall_seconds: float = STALL_SECONDS,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Load a checkpoint, packed where it is NVFP4, ready to run.

    Args:
        model: a checkpoint folder, or a Hub id, which is downloaded first.
        device: ``"auto"`` takes the first GPU, or the CPU where there is none.
        dtype: of what is not packed, and of the arithmetic. ``"auto"`` is the checkpoint's own, and the rule.
        speech: False leaves talker and code2wav out, and the model's config says so.
        backend: how packed weights are run, see `choose_backend`.
        progress: True shows a line on standard error, False does not, None shows it on a terminal; or a function
            that is called with bytes done, bytes in all and the tensor's name.
        stall_seconds: after so long without a tensor, standard error is told where the load stands.
        revision: of a Hub id.
        options: passed on to ``from_pretrained``, such as ``attn_implementation``.

    Returns:
        The Transformers model, in evaluation mode.

    Raises:
        OmniFP4Error: anything about the arguments or the checkpoint that is not right; before weights are read, but for
            faults that only the weights show.
    """
    folder = local_folder(str(model), revision)
    checkpoint = open_checkpoint(folder)
    target = find_device(device)
    wanted = _find_dtype(dtype, checkpoint.config)
    is_packed = _check_claim(checkpoint)
    if is_packed:
        check_dtype(wanted)
        choose_backend(target, backend)
    entries = {name: e for name, e in checkpoint.tensors.items() if speech or not name.startswith(_speech_prefixes())}
    _check_memory(sum(entry.nbytes for entry in entries.values()), target, checkpoint.location)
    packed: set[str] = set()
    if is_packed:
        packed = {entry.name for item in find_linears(entries).values() for entry in tensors_of(item)}
        packed |= {entry.name for item in find_coded(entries).values() for entry in item.entries}
    # Without a quantizer or accelerate, Transformers takes weights through host memory.
    straight = target if is_packed or find_spec("accelerate") is not None else torch.device("cpu")
    watch = LoadProgress(
        show=progress is True or (progress is None and sys.stderr.isatty()),
        on_progress=progress if callable(progress) else None,
        stall_seconds=stall_seconds,
    )
    with (
        CheckpointReader(checkpoint) as reader,
        loading_with(LoadOptions(backend, target, watch, min(16, os.cpu_count() or 1), checkpoint)),
        watch.running(),
    ):
        state = wide_tensors((e for name, e in entries.items() if name not in packed), reader, watch, straight)
        loaded = _from_pretrained(checkpoint, wanted, target, speech, state, options)
    mend_talker(loaded)
    return loaded.eval()


def _from_pretrained(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    speech: bool,
    state: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Any:
    from omnifp4.runtime.registration import register

    declare_missing_operators()
    register()
    import transformers
    from transformers.utils import logging as transformers_logging

    config = transformers.AutoConfig.from_pretrained(checkpoint.location)
    if not speech:
        if not hasattr(config, "enable_audio_output"):
            raise ModelError(
                f"{checkpoint.location}: a {config.model_type} has no speech to leave out", hint="drop speech=False"
            )
        config.enable_audio_output = False
    arguments = dict(options)
    # The quantizer places a packed checkpoint; for others Transformers needs accelerate.
    if device.type != "cpu" and not hasattr(config, "quantization_config") and find_spec("accelerate") is not None:
        arguments["device_map"] = {"": device}
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        # A name and a state dict cannot be given together.
        model = _model_class(config).from_pretrained(None, config=config, dtype=dtype, state_dict=state, **arguments)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    model.config.name_or_path = checkpoint.location
    if model.can_generate() and (Path(checkpoint.location) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.location)
    if model.device.type != device.type:
        tell_once("accelerate is not installed, so the weights passed through host memory")
        model = model.to(device)
    return model


def _model_class(config: Any) -> Any:
    import transformers

    named = next(iter(config.architectures or ()), None) or CLASSES.get(config.model_type)
    if named is None:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    found = getattr(transformers, named, None)
    if found is None:
        raise ModelError(
            f"config.json: architectures names {named!r}, which transformers {transformers.__version__} lacks"
        )
    return found


def _speech_prefixes() -> tuple[str, ...]:
    return tuple(f"{part}." for part in OPTIONAL_PARTS)


def _find_dtype(dtype: str | torch.dtype, config: Mapping[str, Any]) -> torch.dtype:
    """The dtype asked for; what the config says where that is ``"auto"``, BF16 where it says nothing."""
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype
    if dtype == "auto":
        thinker = config.get("thinker_config")
        inner = thinker.get("dtype") or thinker.get("torch_dtype") if isinstance(thinker, Mapping) else None
        name = config.get("dtype") or config.get("torch_dtype") or inner or "bfloat16"
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise OmniFP4Error(f"dtype {name!r} is unknown", hint="use dtype='auto'")
    return found


def _check_claim(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint says that it is quantized; refuse one that is and does not say so where it is seen."""
    claims = find_claims(checkpoint.config, checkpoint.folder)
    if "quantization_config" in checkpoint.config:
        return True
    found = [f"{linear.packed.name!r} holds NVFP4" for linear in find_linears(checkpoint.tensors).values()]
    found += [f"{one.codes.name!r} holds {one.scheme.value.upper()}" for one in find_coded(checkpoint.tensors).values()]
    if not found and not claims:
        if left := next((name for name in checkpoint.tensors if name.endswith("_amax")), None):
            raise CheckpointError(
                f"{checkpoint.location}: {left!r} shows that it was calibrated, but its weights were never quantized",
                hint="omnifp4 quantize SOURCE OUT makes it from the wide checkpoint",
            )
        return False
    where = claims[0].place if claims else ""
    if where == LEGACY_QUANT_CONFIG_NAME or where:
        told = f"its quantization is told only in {where}, where Transformers does not look"
    else:
        told = f"{found[0]} codes, yet config.json has no quantization_config"
    raise CheckpointError(f"{checkpoint.location}: {told}", hint=f"omnifp4 repair {checkpoint.location} OUT")


def _check_memory(nbytes: int, device: torch.device, subject: str) -> None:
    """Refuse what cannot fit, before minutes are spent on it."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if free is not None and nbytes > free:
        raise OmniFP4Error(
            f"{subject}: its weights take {nbytes / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free",
            hint="speech=False leaves the talker out; or choose another device",
        )
