"""The table of rules, on evidence made by hand: variants of what the scripts show, and what must stay silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from omnifp4.doctor.evidence import Evidence, Thrown
from omnifp4.doctor.rules import explain
from omnifp4.receipt.diagnosis import CallCount, GenerateRecord, LoadRecord, Outcome
from omnifp4.receipt.doctor import Severity

OMNI = "Qwen3OmniMoeForConditionalGeneration"


def load(path: str, result: str = OMNI, loader: str = OMNI, error: str = "", **arguments: str) -> LoadRecord:
    return LoadRecord(loader=loader, path=path, arguments=arguments, seconds=1.0, result=result, error=error)


def generated(result: str = "", error: str = "", roles: tuple[str, ...] = ("user", "assistant"), **arguments: str) -> GenerateRecord:  # fmt: skip
    return GenerateRecord(model=OMNI, tokens=9, roles=roles, arguments=arguments, result=result, error=error)


def failed(*thrown: Thrown, **fields: object) -> Evidence:
    return Evidence(outcome=Outcome.FAILED, status=1, thrown=list(thrown), **fields)  # type: ignore[arg-type]


def rules(evidence: Evidence, severity: Severity = Severity.PROBLEM) -> list[str]:
    return [item.rule for item in explain(evidence) if item.severity is severity]


NO_ASSISTANT = "index -1 is out of bounds for dimension 0 with size 0"


def test_prompt_that_does_not_open_the_answer() -> None:
    evidence = failed(
        Thrown("generate", "IndexError", NO_ASSISTANT), generates=[generated(error="IndexError", roles=("user",))], roles_known=[True]
    )  # fmt: skip
    (found,) = explain(evidence)
    assert found.rule == "prompt.no-assistant"
    assert any("role markers seen: user" in line for line in found.evidence)


def test_index_errors_elsewhere_are_not_about_roles() -> None:
    assert rules(failed(Thrown("script", "IndexError", NO_ASSISTANT))) == ["error.unexplained"]
    cat = "torch.cat(): expected a non-empty list of Tensors"
    assert rules(failed(Thrown("script", "RuntimeError", cat))) == ["error.unexplained"]


def test_text_prompt_without_roles_is_a_note() -> None:
    evidence = Evidence(generates=[generated("Tensor", roles=())], roles_known=[True])
    assert rules(evidence) == []
    assert rules(evidence, Severity.NOTE) == ["prompt.no-roles"]


def test_models_without_roles_are_left_alone() -> None:
    assert explain(Evidence(generates=[generated("Tensor", roles=())], roles_known=[False])) == ()


@pytest.mark.parametrize(
    ("type_", "message", "returned"),
    [
        ("AttributeError", "'Tensor' object has no attribute 'sequences'", "Tensor"),
        ("AttributeError", "'tuple' object has no attribute 'sequences'", "tuple"),
        ("ValueError", "not enough values to unpack (expected 2, got 1)", "Tensor"),
        ("TypeError", "tuple indices must be integers or slices, not tuple", "tuple"),
        ("AttributeError", "'GenerateDecoderOnlyOutput' object has no attribute 'shape'", "GenerateDecoderOnlyOutput"),
    ],
)
def test_result_taken_for_another(type_: str, message: str, returned: str) -> None:
    thrown = Thrown("script", type_, message)
    assert rules(failed(thrown, generates=[generated(returned)], roles_known=[True])) == ["generate.result"]
    assert rules(failed(thrown)) == ["error.unexplained"]


def test_ignored_max_new_tokens_is_a_note() -> None:
    evidence = Evidence(generates=[generated("Tensor", max_new_tokens="5")], roles_known=[True])
    assert rules(evidence) == []
    assert rules(evidence, Severity.NOTE) == ["generate.max-new-tokens"]
    both = Evidence(generates=[generated("Tensor", max_new_tokens="5", thinker_max_new_tokens="5")], roles_known=[True])
    assert explain(both) == ()


def test_signature_mismatch_with_its_share() -> None:
    message = "forward() got an unexpected keyword argument 'audio'"
    evidence = Evidence(
        thrown=[Thrown("call", "TypeError", message, subject="Thinker", count=45)],
        calls=[CallCount(model="Thinker", calls=60, failed=45, messages={f"TypeError: {message}": 45})],
        calibrations=[{"calls": 60, "failed": 45, "has_loop": True}],
    )
    (found,) = explain(evidence)
    assert found.rule == "forward.signature"
    assert "45 of 60 calls of the calibration failed (75%), and the script went on" in found.evidence


@pytest.mark.parametrize(("lost", "expected"), [(1, Severity.NOTE), (6, Severity.PROBLEM)])
def test_swallowed_failures_of_any_kind(lost: int, expected: Severity) -> None:
    calls = [CallCount(model="M", calls=10, failed=lost, messages={"ValueError: bad sample": lost})]
    (found,) = explain(Evidence(calls=calls))
    assert (found.rule, found.severity) == ("calls.swallowed", expected)
    in_calibration = Evidence(calls=calls, calibrations=[{"calls": 10, "failed": lost, "has_loop": True}])
    assert explain(in_calibration)[0].severity is Severity.PROBLEM


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        ("CUDA out of memory. Tried to allocate 61.10 GiB", "memory.gpu"),
        ("Cannot use talker when talker module not initialized. Use `enable_talker` method", "speech.no-talker"),
        ("Speaker Bob not implemented", "speech.speaker"),
        ("Using a `device_map` requires `accelerate`. You can install it", "environment.accelerate"),
        ("FlashAttention2 has been toggled on, but it cannot be used", "environment.flash-attn"),
        ("Torch not compiled with CUDA enabled", "environment.no-cuda"),
        ("Cannot use chat template functions because tokenizer.chat_template is not set", "prompt.no-template"),
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", "memory.host"),
        ("Model architectures ['Qwen3OmniMoeForConditionalGeneration'] are not supported for now.", "vllm.architecture"),
        ("Model architecture not supported", "vllm.architecture"),
        ("_forward_unimplemented() got an unexpected keyword argument 'input_ids'", "forward.missing"),
        ("The model is missing the required \"forward\" function", "forward.missing"),
        ("No module named 'modelopt'", "environment.module"),
        ("cannot import name 'Qwen3OmniMoeProcessor' from 'transformers' (x.py)", "load.old-transformers"),
        ("model type `qwen3_omni_moe` but Transformers does not recognize this architecture.", "load.old-transformers"),
    ],
)  # fmt: skip
def test_messages(message: str, rule: str) -> None:
    assert rules(failed(Thrown("script", "RuntimeError", message))) == [rule]


def test_install_names_differ_from_module_names() -> None:
    (found,) = explain(failed(Thrown("script", "ModuleNotFoundError", "No module named 'modelopt'")))
    assert found.fix == "pip install nvidia-modelopt"


def test_compressed_tensors_loaded_without_omnifp4(compressed: Path) -> None:
    evidence = Evidence(loads=[load(str(compressed))], kinds=["model"])
    assert rules(evidence) == ["load.scales-lost"]
    evidence.imported = ("omnifp4",)
    assert rules(evidence) == []
    needed = failed(
        Thrown("load", "ImportError", "compressed-tensors>=0.15.0 is required for compressed-tensors quantization."),
        loads=[load(str(compressed), result="", error="ImportError")],
        kinds=["model"],
    )
    assert rules(needed) == ["load.nvfp4-without-omnifp4"]


def test_bfloat16_on_a_quantized_checkpoint_is_right(nvfp4: Path) -> None:
    evidence = Evidence(loads=[load(str(nvfp4), dtype="torch.bfloat16")], kinds=["model"], imported=("omnifp4",))
    assert explain(evidence) == ()


def test_fit_is_told_with_out_of_memory(tiny: Path) -> None:
    evidence = failed(
        Thrown("script", "OutOfMemoryError", "CUDA out of memory."), loads=[load(str(tiny))], kinds=["model"]
    )
    (found,) = explain(evidence)
    assert any("text decoder is" in line and "of weights" in line for line in found.evidence)


def test_words_in_the_output_of_a_good_run_are_no_failure() -> None:
    lines = ["CUDA out of memory is explained in chapter 4", "Unknown quantization method names are listed below"]
    assert explain(Evidence(lines=lines)) == ()
    assert rules(Evidence(lines=["Error: CUDA out of memory"])) == ["memory.gpu"]


def test_stall_of_a_quantized_load_names_its_dtype(nvfp4: Path) -> None:
    record = load(str(nvfp4), torch_dtype="torch.float16").model_copy(update={"seconds": None, "result": ""})
    evidence = Evidence(
        outcome=Outcome.STALLED, status=None, stalled_for=130.0, loads=[record], kinds=["model"], is_loading=True
    )
    found = {item.rule: item for item in explain(evidence)}
    assert set(found) == {"stall.load", "load.dtype"}
    assert "dtype float16 of a quantized checkpoint" in found["stall.load"].cause
    assert "the load had not ended" in found["load.dtype"].evidence
