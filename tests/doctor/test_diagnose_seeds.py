"""Every failure that the seeds tell of: reproduced, and explained rightly with its fix."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from omnifp4.receipt.diagnosis import DiagnosisReceipt, Explanation, Outcome
from omnifp4.receipt.doctor import Severity

pytestmark = pytest.mark.xdist_group("doctor")

Diagnosed = Callable[[str], DiagnosisReceipt]


def explained(receipt: DiagnosisReceipt, rule: str) -> Explanation:
    found = {item.rule: item for item in receipt.explanations}
    assert rule in found, (sorted(found), receipt.error, receipt.output_tail)
    return found[rule]


def problems(receipt: DiagnosisReceipt) -> list[str]:
    return [item.rule for item in receipt.explanations if item.severity is Severity.PROBLEM]


def test_plain_prompt_crashes_the_talker(diagnosed: Diagnosed) -> None:
    """The first seed's whole story, in Transformers 5.19 and later."""
    receipt = diagnosed("plain-prompt")
    assert (receipt.outcome, receipt.exit_status, receipt.healthy) == (Outcome.FAILED, 1, False)
    assert problems(receipt) == ["prompt.no-roles"]
    found = explained(receipt, "prompt.no-roles")
    assert "index -1 is out of bounds" in found.evidence[0]
    assert any("role markers seen: none" in line for line in found.evidence)
    assert any("torch.cat: " in line and "none with an empty list" in line for line in found.evidence)
    assert any("user_script.py" in line for line in found.evidence)
    assert "no fault of the quantization" in found.cause
    assert "apply_chat_template" in found.fix and "add_generation_prompt=True" in found.fix


def test_empty_cat_with_count_place_and_roles(diagnosed: Diagnosed) -> None:
    """The same in Transformers up to 5.14."""
    receipt = diagnosed("empty-cat")
    # The script caught it and ended well: it is explained all the same.
    assert (receipt.outcome, receipt.healthy) == (Outcome.ENDED, False)
    assert problems(receipt) == ["prompt.no-roles"]
    assert receipt.cat.calls >= 31
    assert receipt.cat.empty == 1
    assert "user_script.py" in receipt.cat.place and "torch.cat([embed" in receipt.cat.place
    found = explained(receipt, "prompt.no-roles")
    assert "expected a non-empty list" in found.evidence[0]
    assert any(f"{receipt.cat.calls:,} calls, 1 with an empty list" in line for line in found.evidence)
    assert "empty list: talker_input_embeds" in found.evidence
    assert any("role markers seen: none" in line for line in found.evidence)


def test_calibration_that_saw_nothing_and_exited_zero(diagnosed: Diagnosed) -> None:
    """60 of 60 samples failed, the model was saved, 1.00x, exit status 0."""
    receipt = diagnosed("calibration")
    assert (receipt.outcome, receipt.exit_status, receipt.healthy) == (Outcome.ENDED, 0, False)
    assert problems(receipt) == ["forward.missing", "weights.not-packed"]
    found = explained(receipt, "forward.missing")
    assert "_forward_unimplemented() got an unexpected keyword argument 'input_ids' (60 times)" in found.evidence[0]
    assert "60 of 60 calls of the calibration failed (100%), and the script went on" in found.evidence
    assert any("in calibrate_model" in line for line in found.evidence)
    assert "Quantization has changed no signature" in found.cause
    assert "model.thinker(**inputs)" in found.fix
    size = explained(receipt, "weights.not-packed")
    assert size.title.startswith("1.00x")
    assert "Compression ratio: 1.00x" in size.evidence
    assert "vLLM does not read them" in size.cause
    assert "omnifp4 quantize" in size.fix
    assert receipt.structure is not None
    assert receipt.structure.quantized_share > 0.3
    assert not receipt.structure.packed


def test_wrong_auto_class_and_tokenizer(diagnosed: Diagnosed) -> None:
    """Both attempts of the official-pattern seed."""
    receipt = diagnosed("wrong-classes")
    assert set(problems(receipt)) == {"load.wrong-class", "prompt.no-roles", "prompt.tokenizer-alone"}
    wrong = explained(receipt, "load.wrong-class")
    assert "AutoModelForCausalLM" in wrong.title
    assert "Qwen3OmniMoeForConditionalGeneration" in wrong.fix
    assert "Qwen3OmniMoeProcessor" in explained(receipt, "prompt.tokenizer-alone").fix


@pytest.mark.parametrize(
    ("name", "returned"),
    [("unpacked-tensor", "Tensor"), ("sliced-tuple", "tuple")],
)
def test_tuple_against_tensor(diagnosed: Diagnosed, name: str, returned: str) -> None:
    receipt = diagnosed(name)
    assert problems(receipt) == ["generate.result"]
    found = explained(receipt, "generate.result")
    assert f"returned a {returned}" in found.title
    assert "return_audio=False" in found.fix


def test_float16_on_a_quantized_checkpoint(diagnosed: Diagnosed) -> None:
    receipt = diagnosed("float16-quantized")
    assert set(problems(receipt)) == {"load.dtype", "load.nvfp4-without-omnifp4"}
    assert 'dtype="auto"' in explained(receipt, "load.dtype").fix
    packed = explained(receipt, "load.nvfp4-without-omnifp4")
    assert "modelopt" in packed.evidence[0]
    assert packed.fix.startswith("import omnifp4")


def test_load_that_hangs(diagnosed: Diagnosed) -> None:
    """Twelve minutes without a word, here in two seconds."""
    receipt = diagnosed("stalled-load")
    assert (receipt.outcome, receipt.exit_status) == (Outcome.STALLED, None)
    found = explained(receipt, "stall.load")
    assert any("nothing moved for 2 s; it used the processor" in line for line in found.evidence)
    assert any("in convert" in line for line in found.evidence)
    assert any("in convert" in line for line in receipt.stack)
    assert "converted" in found.cause
    assert 'dtype="auto"' in found.fix
    assert receipt.fit is not None


def test_disabled_talker_comes_back_random(diagnosed: Diagnosed) -> None:
    receipt = diagnosed("random-talker")
    assert receipt.outcome is Outcome.ENDED
    assert problems(receipt) == ["load.random-talker"]
    assert "enable_audio_output" in explained(receipt, "load.random-talker").fix


def test_torchvision_beside_a_cpu_torch(diagnosed: Diagnosed) -> None:
    torch = pytest.importorskip("torch")
    receipt = diagnosed("torchvision")
    if torch.version.cuda is not None or receipt.outcome is Outcome.ENDED:
        pytest.skip("torchvision imports here")
    assert problems(receipt) == ["environment.torchvision"]
    assert "import omnifp4" in explained(receipt, "environment.torchvision").fix


def test_string_content(diagnosed: Diagnosed) -> None:
    found = explained(diagnosed("string-content"), "prompt.string-content")
    assert '{"type": "text", "text": "Hello!"}' in found.fix


def test_early_transformers(diagnosed: Diagnosed) -> None:
    assert "transformers>=5.17" in explained(diagnosed("early-transformers"), "load.early-transformers").fix


def test_forward_loop_without_argument(diagnosed: Diagnosed) -> None:
    receipt = diagnosed("loop-without-argument")
    assert problems(receipt) == ["calibration.loop-arguments"]


def test_invented_quantization_name(diagnosed: Diagnosed) -> None:
    receipt = diagnosed("invented-fp4")
    assert problems(receipt) == ["vllm.invented-method"]
    found = explained(receipt, "vllm.invented-method")
    assert "quantization='fp4'" in found.title
    assert "LLM(model=path)" in found.fix


def test_unknown_method_of_an_old_version(diagnosed: Diagnosed) -> None:
    receipt = diagnosed("unknown-modelopt")
    assert receipt.outcome is Outcome.ENDED
    assert problems(receipt) == ["vllm.unknown-method"]
    assert "too old" in explained(receipt, "vllm.unknown-method").cause


def test_architecture_not_supported(diagnosed: Diagnosed) -> None:
    found = explained(diagnosed("architecture"), "vllm.architecture")
    assert "vllm-omni" in found.fix
    assert "vLLM 0.11.0" in found.evidence


def test_engine_out_of_memory(diagnosed: Diagnosed) -> None:
    receipt = diagnosed("engine-memory")
    assert problems(receipt) == ["memory.gpu"]
    assert "--max-model-len" in explained(receipt, "memory.gpu").fix
    assert receipt.fit is not None


def test_method_against_the_config(diagnosed: Diagnosed) -> None:
    assert problems(diagnosed("method-mismatch")) == ["vllm.method-mismatch"]
