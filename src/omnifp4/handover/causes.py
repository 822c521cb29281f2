"""Why an engine did not start: the known causes, found in its log, each with the next command.

The doctor's rules for engines and memory come first; those here are about serving.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from omnifp4.doctor.evidence import Evidence, Thrown
from omnifp4.doctor.rules import engines, memory
from omnifp4.handover.log_reading import plain
from omnifp4.receipt.diagnosis import Explanation, Outcome
from omnifp4.receipt.doctor import Severity

SHOWN_LINES: Final = 3


@dataclass(frozen=True, slots=True)
class Cause:
    """One known cause.

    Attributes:
        pattern: in the log.
        fix: what to do next; ``{groups}`` of the pattern may stand in it, and in the title.
    """

    rule: str
    pattern: str
    title: str
    cause: str
    fix: str


CAUSES: Final = (
    Cause(
        "serve.port",
        r"(?:Address already in use|\[Errno 98\]|error while attempting to bind)",
        "the port is taken",
        "another program listens there, perhaps an engine that was left running",
        "omnifp4 serve MODEL --port ANOTHER",
    ),
    Cause(
        "serve.arguments",
        r"unrecognized arguments: (?P<arguments>.{1,200})|error: argument (?P<argument>.{1,200})",
        "this version does not know an argument: {arguments}{argument}",
        "the installed version has other arguments than those that were read here (vLLM 0.20 to 0.32)",
        "omnifp4 engine install vllm makes an environment with the version that is known; omnifp4 serve MODEL --print shows the command",
    ),
    Cause(
        "serve.free-memory",
        r"Free memory on device .{0,80}is less than desired GPU memory utilization",
        "other programs hold too much of the GPU",
        "vLLM takes a share of the whole GPU and refuses to start if less is free",
        "nvidia-smi shows who holds it; or lower --gpu-memory-utilization",
    ),
    Cause(
        "serve.context",
        r"To serve at least one request with the model's max seq len \((?P<asked>\d+)\)(?:.{0,300}estimated maximum model length is (?P<fits>\d+))?",
        "a context of {asked} tokens does not fit beside the weights",
        "the key/value cache of one sequence is larger than the memory that is left",
        "omnifp4 serve MODEL with a smaller --context {fits}",
    ),
    Cause(
        "serve.no-cache-memory",
        r"No available memory for the cache blocks",
        "the weights leave no memory for the key/value cache",
        "the share of the GPU that the engine may take is used up by weights and graphs",
        "raise --gpu-memory-utilization, or lower --context; omnifp4 doctor MODEL shows what fits",
    ),
    Cause(
        "serve.experts-backend",
        r"moe_backend='(?P<backend>\w+)' is not supported for NvFP4 MoE",
        "the MoE backend {backend} cannot run NVFP4 experts",
        "vLLM has no NVFP4 kernel of that name; vLLM-Omni 0.30's own deploy file pins triton",
        "omnifp4 serve MODEL --engine vllm-omni writes a deploy file with one that it has",
    ),
    Cause(
        "serve.no-kernel",
        r"(?:No NvFp4 MoE backend supports the deployment|Forced NVFP4 kernel .{0,80} is not supported|does not support the deployment configuration|Failed to find a kernel that can implement the NVFP4|no kernel image is available)",
        "there is no NVFP4 kernel for this GPU and these widths",
        "Marlin needs compute capability 7.5 and hidden widths of a multiple of 64; FP4 units need Blackwell",
        "omnifp4 doctor MODEL names the kernels for this GPU; --emulate runs without one, slowly",
    ),
    Cause(
        "serve.heads",
        r"Total number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size \((?P<size>\d+)\)",
        "{heads} heads cannot be shared by {size} GPUs",
        "tensor parallelism divides the heads",
        "omnifp4 serve MODEL --tensor-parallel SIZE with a size that divides {heads}",
    ),
    Cause(
        "serve.world-size",
        r"World size \((?P<size>\d+)\) is larger than the number of available GPUs \((?P<gpus>\d+)\)",
        "{size} GPUs were asked for and {gpus} are here",
        "tensor parallelism over several hosts needs a Ray cluster",
        "omnifp4 serve MODEL --tensor-parallel {gpus}; for several hosts see docs/vllm.md",
    ),
    Cause(
        "serve.no-gpu",
        r"(?:Failed to infer device type|No CUDA GPUs are available|Found no NVIDIA driver|libcuda\.so\.1: cannot open)",
        "the engine sees no GPU",
        "no driver, a driver older than its CUDA, or CUDA_VISIBLE_DEVICES hides them; vLLM's own packages need a GPU",
        "nvidia-smi; and omnifp4 doctor",
    ),
    Cause(
        "serve.driver",
        r"(?:CUDA driver version is insufficient|driver on your system is too old|forward compatibility was attempted)",
        "the driver is older than the engine's CUDA",
        "vLLM's packages are built for one CUDA version, which needs a driver of its time",
        "a newer driver, or omnifp4 engine install vllm --version with one built for an older CUDA",
    ),
    Cause(
        "serve.weights-names",
        r"There is no module or parameter named '?(?P<name>[\w.]+)'?",
        "the checkpoint has a tensor that the engine's model does not have: {name}",
        "names are those of another Transformers, or the artifact was saved by a tool that renames modules",
        "omnifp4 verify MODEL names it; omnifp4 repair MODEL OUT mends the names",
    ),
    Cause(
        "serve.tokenizer",
        r"(?:Can't load tokenizer|Couldn't instantiate the backend tokenizer|tokenizer\S* .{0,60}(?:not found|No such file)|Can't load (?:image processor|feature extractor|processor))",
        "tokenizer or processor files are missing",
        "the artifact lacks side files of the original",
        "copy tokenizer, processor and chat template files from the original; omnifp4 verify MODEL --against ORIGINAL lists them",
    ),
    Cause(
        "serve.package",
        r"ModuleNotFoundError: No module named '(?P<package>[\w.]+)'",
        "the engine's environment lacks the package {package}",
        "it was made by hand, or something was removed from it",
        "omnifp4 engine install vllm --replace makes one that is whole",
    ),
    Cause(
        "serve.import",
        r"ImportError: (?P<what>.{1,200})",
        "the engine's environment does not import: {what}",
        "packages that do not belong together, such as a torch of another release than vLLM was built for",
        "omnifp4 engine install vllm makes an environment with pinned versions",
    ),
    Cause(
        "serve.config",
        r"(?:validation error for \w*Config|pydantic_core\.\S*ValidationError).{0,300}?Value error, (?P<what>.{1,240})",
        "the engine refuses its configuration: {what}",
        "an argument and the model's config do not go together",
        "omnifp4 serve MODEL --print shows the command; omnifp4 verify MODEL checks the config",
    ),
    Cause(
        "serve.killed",
        r"(?:exit(?:ed with)? code:? -9\b|SIGKILL|[Oo]ut[- ]of[- ]memory: Killed process)",
        "a process of the engine was killed",
        "as the system does when RAM runs out: loading reads whole shards",
        "more RAM or swap; omnifp4 doctor MODEL shows what is needed",
    ),
    Cause(
        "serve.shared-memory",
        r"(?:No space left on device.{0,80}/dev/shm|Bus error|unable to (?:open|allocate) shared memory)",
        "shared memory is too small",
        "the engine's processes talk through /dev/shm, which a container limits to 64 MB",
        "start the container with --shm-size 8g or --ipc host",
    ),
    Cause(
        "serve.stage",
        r"[Ss]tage[- ]?(?P<stage>\d)\S* .{0,80}(?:timed out|timeout|failed to (?:start|initiali[sz]e))",
        "stage {stage} of vLLM-Omni did not start",
        "its own lines stand above in the log",
        "omnifp4 serve MODEL --engine vllm-omni --start-timeout 1800 if it was only slow",
    ),
)  # fmt: skip
"""The specific before the general: what is found first is named first."""


def find_causes(lines: Sequence[str], versions: Mapping[str, str], status: int | None) -> tuple[Explanation, ...]:
    """Every known cause in the log of an engine that ended, or did not become healthy.

    Args:
        lines: of the log.
        versions: of the engine's environment.
        status: with which it ended; None: it runs.
    """
    clean = [plain(line) for line in lines]
    found: dict[str, Explanation] = {}
    for item in (*_of_serving(clean), *_of_doctor(clean, versions, status)):
        found.setdefault(item.rule, item)
    if not found and status is not None:
        found["serve.unknown"] = _unknown(clean, status)
    return tuple(found.values())


def _of_serving(lines: Sequence[str]) -> Iterator[Explanation]:
    text = "\n".join(lines)
    for cause in CAUSES:
        match = re.search(cause.pattern, text, re.DOTALL)
        if match is None:
            continue
        groups = {name: " ".join(value.split()) if value else "" for name, value in match.groupdict().items()}
        line = text[text.rfind("\n", 0, match.start()) + 1 :].partition("\n")[0]
        yield Explanation(
            rule=cause.rule,
            severity=Severity.PROBLEM,
            title=cause.title.format(**groups),
            cause=cause.cause.format(**groups),
            evidence=(line.strip()[:400],),
            fix=cause.fix.format(**groups),
        )


def _of_doctor(lines: Sequence[str], versions: Mapping[str, str], status: int | None) -> Iterator[Explanation]:
    """The doctor's rules, asked as of a script that ran vLLM."""
    told = [line for line in lines if re.search(r"Error|error|Unknown|not support|CUDA out of memory", line)]
    evidence = Evidence(
        outcome=Outcome.FAILED,
        status=status,
        thrown=[Thrown("vllm", "", line) for line in told],
        versions=dict(versions),
        lines=list(lines),
    )
    for rule in (*engines.RULES, *memory.RULES):
        yield from rule(evidence)


def _unknown(lines: Sequence[str], status: int) -> Explanation:
    """The last lines that speak of an error, as they are."""
    errors = [line.strip() for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
    shown = errors[-SHOWN_LINES:] or [line.strip() for line in lines if line.strip()][-SHOWN_LINES:]
    return Explanation(
        rule="serve.unknown",
        severity=Severity.PROBLEM,
        title=f"the engine ended with status {status}",
        cause="this is none of the causes that are known here",
        evidence=tuple(line[:400] for line in shown),
        fix="its log says more",
    )
