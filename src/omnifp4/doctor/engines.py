"""Which engine can run a checkpoint on this machine: one judgement each, over the rules as data."""

from __future__ import annotations

from omnifp4.doctor import engine_rules as rules
from omnifp4.doctor.facts import Facts, Kind
from omnifp4.doctor.fit import GPU_ROOM_BYTES, LEAST_TOKENS, best_row, devices_of, gb, list_loads
from omnifp4.doctor.question import CAN, CANNOT, NOT_KNOWN, Judgement, Question
from omnifp4.doctor.reading import Reading, read_by_vllm, read_by_vllm_omni
from omnifp4.doctor.versions import minor, numbers
from omnifp4.receipt.doctor import Ability, EngineRow, Severity

OMNI_TYPES = ("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen2_5_omni")


def judge_engines(question: Question) -> tuple[EngineRow, ...]:
    """All five engines, the one of this package first."""
    return (
        _transformers(question),
        _vllm(question),
        _vllm_omni(question),
        _sglang(question),
        _edge_llm(question),
    )


def scenario(original: Ability, artifact: Ability) -> str:
    """A: the engine reads both; B: the original only; C: neither; empty where it is not known."""
    if NOT_KNOWN in (original, artifact):
        return ""
    return "C" if original is CANNOT else "A" if artifact is CAN else "B"


def _row(
    question: Question, engine: str, judged: Judgement, read: Reading, original: Ability, version: str, command: str
) -> EngineRow:
    artifact = read.ability
    if broken := question.broken(memory_names=engine == rules.TRANSFORMERS):
        judged.say(CANNOT, broken, f"omnifp4 verify {question.argument}")
        artifact = CANNOT
    return EngineRow(
        engine=engine,
        ability=judged.ability,
        artifact=artifact,
        original=original,
        scenario=scenario(original, artifact),
        version=version,
        reasons=tuple(dict.fromkeys(judged.reasons)),
        fix="" if judged.ability is CAN else judged.fix,
        command=command,
    )


def _transformers(question: Question) -> EngineRow:
    facts, installed, judged = question.facts, question.installed, Judgement()
    version, install = installed["transformers"], rules.INSTALL[rules.TRANSFORMERS]
    for package in ("torch", "transformers"):
        if not installed[package]:
            judged.say(CANNOT, f"{package} is not installed", install)
    if version and minor(version) < minor(rules.TRANSFORMERS_TESTED.first):
        judged.say(CANNOT, f"transformers {version} is older than {rules.TRANSFORMERS_TESTED.first}", install)
    elif version and not rules.TRANSFORMERS_TESTED.holds(version):
        judged.say(NOT_KNOWN, f"transformers {version} was not tried here, {rules.TRANSFORMERS_TESTED} were", install)
    if facts.is_omni:
        _judge_processor(question, judged)
    read = _read_by_transformers(facts)
    for ability, reason, fix in read.told:
        judged.say(ability, reason, fix.format(model=question.argument))
    _judge_memory(question, judged)
    command = f"omnifp4 chat {question.argument}"
    lacking = [c for c in question.concerns if c.severity is Severity.PROBLEM and c.name.startswith("files.")]
    if lacking:
        judged.say(CAN, f"it loads, but cannot be talked with: {lacking[0].finding}", lacking[0].fix)
        command = f'python -c "import omnifp4; omnifp4.load({question.path!r})"'
    return _row(question, rules.TRANSFORMERS, judged, read, CAN, version, command)


def _read_by_transformers(facts: Facts) -> Reading:
    read = Reading()
    if facts.kind is Kind.NVFP4 and facts.dialect in ("modelopt", "compressed-tensors", "auto-round"):
        read.say(CAN, f"omnifp4 loads {facts.dialect} NVFP4 packed; without `import omnifp4` Transformers does not")
        if facts.activations == "W4A4":
            read.say(CAN, "it is W4A4 and runs as W4A16 here: FP4 weights, BF16 activations")
    elif facts.kind is Kind.NVFP4:
        read.say(CANNOT, "its config does not say how it is quantized", "omnifp4 repair {model} OUT")
    elif facts.kind in (Kind.AMAX_ONLY, Kind.FAKE_QUANT):
        read.say(CAN, "it loads as what it is: wide weights, in full size")
    elif facts.kind is Kind.CLAIM_ONLY:
        read.say(CANNOT, "its config claims NVFP4, but no tensor is", "omnifp4 quantize ORIGINAL OUT")
    elif facts.kind is Kind.OTHER:
        read.say(
            NOT_KNOWN,
            f"it is quantized with {facts.dialect or 'an unknown method'}, not NVFP4: Transformers' own loader decides",
        )
    return read


def _judge_processor(question: Question, judged: Judgement) -> None:
    installed = question.installed
    versions = {"torch": installed["torch"]}
    if not installed["torchvision"]:
        judged.say(
            CANNOT, "torchvision is not installed, and the processor needs it", rules.INSTALL[rules.TRANSFORMERS]
        )
    else:
        for reason in rules.broken_pairs("torchvision", installed["torchvision"], versions):
            judged.say(CANNOT, reason, "pip install the torchvision of the same release as torch")
    if not installed["pillow"]:
        judged.say(CANNOT, "pillow is not installed, and the processor needs it", "pip install pillow")
    if not (installed["soundfile"] or installed["av"]):
        judged.say(CAN, "neither soundfile nor av is installed: no sound can be read", "pip install soundfile av")


def _least_tokens(question: Question) -> int:
    """The shortest context that counts as fitting."""
    limit = question.fit.model_context if question.fit is not None else 0
    return min(LEAST_TOKENS, limit) if limit else LEAST_TOKENS


def _judge_memory(question: Question, judged: Judgement) -> None:
    """Whether the model fits the GPU, or else RAM."""
    told = []
    for name, size, _ in devices_of(question.machine, question.device_memory):
        whole = best_row(question.fit, name, speech=True)
        silent = best_row(question.fit, name, speech=False)
        for row, lack in ((whole, ""), (silent, ", without speech")):
            if row is not None and row.most_tokens >= _least_tokens(question):
                judged.say(CAN, f"fits {name}{lack}: {gb(row.weight_bytes)} of weights, {row.most_tokens:,} tokens")
                return
        if silent is not None:
            told.append(f"{name} has {gb(size)} free, {gb(silent.needed_bytes)} are needed")
    if told:
        smaller = (
            "" if question.facts.kind is Kind.NVFP4 else f"omnifp4 plan {question.argument} shows what NVFP4 would need"
        )
        judged.say(CANNOT, f"it does not fit: {'; '.join(told)}", smaller or "a device with more memory; see the tiers")


def _judge_gpu(question: Question, judged: Judgement, *, nvfp4: bool) -> None:
    """What engines that need a GPU say to this one."""
    if question.machine.torch_problem and question.device_memory is None:
        judged.say(CANNOT, question.machine.torch_problem, "a torch built for the driver's CUDA version")
        return
    if not question.has_gpu:
        judged.say(CANNOT, "there is no GPU, and it has no NVFP4 kernel for CPUs" if nvfp4 else "there is no GPU")
        return
    if not question.capability:
        return
    kernels = rules.kernels_for(question.capability)
    if kernels is None:
        judged.say(CANNOT, f"no NVFP4 kernel for compute capability {question.capability}") if nvfp4 else None
    elif nvfp4:
        judged.say(CAN, f"compute capability {question.capability}: {kernels.weights}")
        if question.facts.activations == "W4A4" and not kernels.native:
            judged.say(CAN, "W4A4 runs as W4A16 before Blackwell: what is measured here is not W4A4")


def _served_tokens(question: Question, *, speech: bool) -> int:
    """A context for ``--max-model-len`` that 90 % of the GPU holds."""
    devices = [d for d in devices_of(question.machine, question.device_memory) if d[0] != "RAM"]
    loads = [load for load in list_loads(question.facts) if speech or "speech" not in load.name]
    if not devices or not loads:
        return 0
    limit = question.fit.model_context if question.fit is not None else 0
    tokens = loads[-1].most_tokens(int(devices[0][1] * 0.9), GPU_ROOM_BYTES, 1, limit)
    return tokens // 1024 * 1024 or tokens


def _judge_room(question: Question, judged: Judgement, *, speech: bool) -> str:
    """Flags for memory; says so if there is not enough of it."""
    tokens = _served_tokens(question, speech=speech)
    if question.has_gpu and question.fit is not None and tokens < min(1024, _least_tokens(question)):
        judged.say(
            CANNOT, "the GPU's memory is too small for weights and cache", "a larger GPU, or --tensor-parallel-size"
        )
    return f" --max-model-len {tokens} --gpu-memory-utilization 0.9" if tokens else ""


def _judge_installed(question: Question, judged: Judgement, engine: str, package: str) -> None:
    """Whether it is installed, beside what it needs."""
    version = question.installed[package]
    if not version:
        judged.say(CANNOT, f"{engine} is not installed", rules.INSTALL[engine])
        return
    others = {name: question.installed[name] for name in ("torch", "transformers", "vllm")}
    for reason in rules.broken_pairs(package, version, others):
        judged.say(CANNOT, reason, rules.INSTALL[engine])


def _version(question: Question, package: str) -> str:
    """The version to judge by: the installed one, or the newest known."""
    return question.installed[package] or rules.NEWEST[package]


def _hear(question: Question, judged: Judgement, original: Judgement, read: Reading) -> None:
    """Take over what was found out about the model and the checkpoint; an unknown model cannot be read either."""
    for ability, reason, fix in [(original.ability, r, original.fix) for r in original.reasons] + read.told:
        judged.say(ability, reason, fix.format(model=question.argument))
    if original.ability is not CAN and read.ability is CAN:
        read.ability = original.ability


def _vllm(question: Question) -> EngineRow:
    facts, judged = question.facts, Judgement()
    version = _version(question, "vllm")
    original = Judgement()
    if facts.model_type in OMNI_TYPES and not rules.VLLM_WITH_OMNI_THINKER.holds(version):
        original.say(
            CANNOT, f"vLLM {version} does not know this architecture", "vLLM 0.20 or later, with vLLM-Omni for speech"
        )
    elif not rules.VLLM_READ.holds(version):
        original.say(NOT_KNOWN, f"vLLM {version} was not read here, {rules.VLLM_READ} were")
    read = read_by_vllm(facts, question.checks, version)
    _hear(question, judged, original, read)
    _judge_installed(question, judged, rules.VLLM, "vllm")
    _judge_gpu(question, judged, nvfp4=facts.kind is Kind.NVFP4)
    flags = _judge_room(question, judged, speech=False)
    if facts.is_omni and facts.speaks:
        judged.say(CAN, "it runs the thinker: text out, no speech")
    command = f"vllm serve {question.argument}{flags}"
    return _row(question, rules.VLLM, judged, read, original.ability, question.installed["vllm"], command)


def _judge_pair(question: Question, judged: Judgement, version: str) -> None:
    """vLLM-Omni goes with the vLLM of the same number."""
    vllm = question.installed["vllm"]
    if question.installed["vllm-omni"] and minor(vllm) != minor(version):
        wanted = ".".join(map(str, minor(version)))
        judged.say(
            CANNOT,
            f"vLLM-Omni {version} belongs to vLLM {wanted}, and {vllm or 'none'} is installed",
            rules.INSTALL[rules.VLLM_OMNI],
        )


def _vllm_omni(question: Question) -> EngineRow:
    facts, judged = question.facts, Judgement()
    version = _version(question, "vllm-omni")
    original = Judgement()
    if not facts.is_omni:
        original.say(CANNOT, f"a {facts.model_type or 'model of unknown type'} has no stages to serve: use vLLM")
    elif not rules.VLLM_OMNI_RELEASES.holds(version):
        original.say(NOT_KNOWN, f"vLLM-Omni {version} was not read here")
    read = read_by_vllm_omni(facts, question.checks, version)
    _hear(question, judged, original, read)
    _judge_installed(question, judged, rules.VLLM_OMNI, "vllm-omni")
    _judge_pair(question, judged, version)
    _judge_gpu(question, judged, nvfp4=facts.kind is Kind.NVFP4)
    _judge_room(question, judged, speech=facts.speaks)
    if facts.is_omni and not facts.speaks:
        judged.say(CAN, "there are no talker weights: only text comes out")
    command = f"vllm serve {question.argument} --omni --port 8091"
    if facts.kind is Kind.NVFP4 and rules.VLLM_OMNI_TRITON_EXPERTS.holds(version):
        stages = '{"0": {"moe_backend": "auto"}, "1": {"moe_backend": "auto"}}'
        command += f" --stage-overrides '{stages}'"
        judged.say(CAN, "its deploy file pins moe_backend triton, refused for NVFP4: the command overrides it")
    return _row(question, rules.VLLM_OMNI, judged, read, original.ability, question.installed["vllm-omni"], command)


def _sglang(question: Question) -> EngineRow:
    judged, read = Judgement(), Reading()
    read.say(NOT_KNOWN, f"nobody here has read or run this checkpoint in SGLang (newest seen: {rules.SGLANG_SEEN})")
    _hear(question, judged, Judgement(), read)
    _judge_installed(question, judged, rules.SGLANG, "sglang")
    _judge_gpu(question, judged, nvfp4=False)
    command = f"python -m sglang.launch_server --model-path {question.argument}"
    return _row(question, rules.SGLANG, judged, read, NOT_KNOWN, question.installed["sglang"], command)


def _edge_llm(question: Question) -> EngineRow:
    facts, judged, read = question.facts, Judgement(), Reading()
    version = _version(question, "tensorrt-edgellm")
    original = CAN if facts.model_type == "qwen3_omni_moe" and rules.EDGE_LLM_WITH_OMNI.holds(version) else NOT_KNOWN
    if facts.model_type == "qwen3_omni_moe" and numbers(version) < (0, 9):
        original = CANNOT
        judged.say(CANNOT, f"TensorRT-Edge-LLM {version} does not know Qwen3-Omni", "0.9.0 or later")
    if facts.branches:
        read.say(CANNOT, "it is SVDQuant, whose low-rank branches only omnifp4 runs", rules.INSTEAD_OF_BRANCHES)
    elif facts.kind is Kind.NVFP4 and facts.dialect != "modelopt":
        read.say(CANNOT, f"it takes ModelOpt's form; it refused {facts.dialect} in 0.9.1", rules.TO_MODELOPT)
    elif facts.kind is Kind.NVFP4 and facts.model_type == "qwen3_omni_moe":
        read.say(CAN, "ModelOpt's form; towers, code2wav, talker projections and the code predictor's head stay FP16")
    else:
        read.say(NOT_KNOWN, "only Qwen3-Omni in NVFP4 has been told of here")
    _hear(question, judged, Judgement(), read)
    _judge_installed(question, judged, rules.EDGE_LLM, "tensorrt-edgellm")
    if not question.is_thor:
        judged.say(CANNOT, "it runs on a Jetson Thor, and this is none")
    command = f"tensorrt-edgellm-export {question.argument} OUT/onnx, then build the engines on the Jetson"
    return _row(question, rules.EDGE_LLM, judged, read, original, question.installed["tensorrt-edgellm"], command)
