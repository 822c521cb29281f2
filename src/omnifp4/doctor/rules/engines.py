"""What vLLM says, in the script or in a process that it started."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omnifp4.doctor.engine_rules import INVENTED_METHODS
from omnifp4.doctor.evidence import Evidence
from omnifp4.doctor.rules.base import problem, told
from omnifp4.receipt.diagnosis import Explanation

UNKNOWN = r"Unknown quantization method"
DETECT_FIX = "LLM(model=path)   # vLLM reads the method from config.json; name none"


def unknown_method(evidence: Evidence) -> Iterator[Explanation]:
    """A method that vLLM does not have: invented, or too new for the version."""
    thrown = evidence.seen(UNKNOWN)
    asked = [engine["quantization"].strip("'\"") for engine in evidence.vllm if "quantization" in engine]
    named = re.search(UNKNOWN + r":?\s*['\"]?([\w.-]+)", thrown[0].whole, re.IGNORECASE) if thrown else None
    method = named.group(1).rstrip(".") if named else asked[-1] if asked else ""
    if not thrown and method not in INVENTED_METHODS:
        return
    version = evidence.versions.get("vllm", "")
    told_lines = [*(told(thrown[0]) if thrown else ()), f"quantization={asked[-1]!r}" if asked else ""]
    if method in INVENTED_METHODS:
        yield problem(
            "vllm.invented-method",
            f"vLLM has no quantization={method!r}",
            "the name is invented: vLLM has modelopt_fp4 and compressed-tensors, and makes no FP4 of BF16 weights and _amax "
            "values at load. The checkpoint itself must be NVFP4",
            [*told_lines, f"vLLM {version}" if version else ""],
            DETECT_FIX
            + "\n# if the checkpoint is not FP4 yet: omnifp4 quantize ORIGINAL OUT --format compressed-tensors",
        )
        return
    yield problem(
        "vllm.unknown-method",
        f"this vLLM does not know the quantization method {method!r}",
        "the version is too old for the checkpoint's form, or the name is not one of its methods",
        [*told_lines, f"vLLM {version}" if version else ""],
        DETECT_FIX
        + "\npip install -U vllm   # 0.20 or later\n# or a form that it has long known: omnifp4 convert IN OUT --format compressed-tensors",
    )


def other_method(evidence: Evidence) -> Iterator[Explanation]:
    """An argument against the config."""
    pattern = r"Quantization method specified in the model config \(([\w.-]+)\) does not match"
    for thrown in evidence.seen(pattern):
        found = re.search(pattern, thrown.whole)
        yield problem(
            "vllm.method-mismatch",
            f"the checkpoint is {found.group(1) if found else 'of another method'}, and another method was asked for",
            "the argument must be what config.json says; it is best left out",
            told(thrown),
            DETECT_FIX,
        )
        return


def architecture(evidence: Evidence) -> Iterator[Explanation]:
    """A model that this vLLM cannot build."""
    pattern = r"Model architectures?\b.{0,200}(are|is)? ?not supported|architecture not supported|Cannot find model module.{0,200}Omni"
    for thrown in evidence.seen(pattern):
        version = evidence.versions.get("vllm", "")
        yield problem(
            "vllm.architecture",
            "this vLLM does not know the model's architecture",
            "Qwen3-Omni is younger than the version, or speech is wanted: plain vLLM runs the thinker alone, speech needs "
            "vLLM-Omni, whose number must be that of the vLLM beside it",
            [*told(thrown), f"vLLM {version}" if version else ""],
            "pip install vllm==0.30.0 vllm-omni==0.30.0   # in an environment of its own\nvllm serve PATH --omni --port 8091",
        )
        return


def head_size(evidence: Evidence) -> Iterator[Explanation]:
    """The thinker's head has no name in plain vLLM."""
    pattern = r"lm_head.{0,120}(weight_scale|not found|size mismatch|shape)|(KeyError|AssertionError).{0,80}lm_head"
    for thrown in evidence.find(pattern, "vllm"):
        yield problem(
            "vllm.nameless-head",
            "vLLM takes the thinker's BF16 head for FP4",
            "vLLM 0.26 to 0.33 builds lm_head without a name, so that no ignore entry of ModelOpt's form reaches it",
            told(thrown),
            "omnifp4 convert IN OUT --format compressed-tensors, or serve it with vLLM-Omni",
        )
        return


def triton_experts(evidence: Evidence) -> Iterator[Explanation]:
    """The backend that vLLM-Omni's deploy file pins."""
    for thrown in evidence.seen(
        r"moe_backend.{0,80}triton.{0,200}(not support|NVFP4|NvFp4)|triton.{0,80}not support.{0,80}(nvfp4|fp4)"
    ):
        yield problem(
            "vllm-omni.triton-experts",
            "the deploy file asks for Triton experts, which NVFP4 does not have",
            "vLLM-Omni 0.30 pins moe_backend: triton",
            told(thrown),
            'vllm serve PATH --omni --stage-overrides \'{"0": {"moe_backend": "auto"}, "1": {"moe_backend": "auto"}}\'',
        )
        return


RULES = (unknown_method, other_method, architecture, head_size, triton_experts)
