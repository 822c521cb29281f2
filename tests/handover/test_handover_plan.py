"""What is decided before anything runs: parallelism, memory, backends, stages, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handover_machines import GB, Heard, gpu, machine

from omnifp4.doctor.facts import Facts, facts_of
from omnifp4.errors import OmniFP4Error
from omnifp4.handover import serve_with
from omnifp4.handover.artifact import marlin_padding, marlin_problem, speech_problem
from omnifp4.handover.log_reading import kernels_used, memory_told, step_of
from omnifp4.handover.options import Options, read_options
from omnifp4.handover.placement import Placement, can_divide, choose_parallel, place
from omnifp4.handover.serving import prepare
from omnifp4.quantization.package import artifact_config
from omnifp4.quantization.plan import plan_job
from omnifp4.receipt.doctor import Accelerator

Here = Callable[..., None]


@pytest.fixture(scope="module")
def full() -> Facts:
    """The released model's NVFP4 artifact, from its config alone."""
    from dataclasses import replace

    from omnifp4.benchmark.headers import imagine, shape_config

    name = "qwen3-omni-30b-a3b"
    wide = imagine(name, shape_config(name, None), packed=False).checkpoint
    config = artifact_config(plan_job(wide))
    packed = imagine(name, shape_config(name, None), packed=True).checkpoint
    return facts_of(replace(packed, config=config))


def prepared(model: Path, engine: str, *gpus: Accelerator, **options: Any) -> list[str]:
    """Arguments after ``serve MODEL``, and the deploy file as last element."""
    found = prepare(
        str(model), engine, Options(cache=Path("/cache"), **options), host="127.0.0.1", port=8000, print_only=True,
        output=Heard(), machine=machine(*gpus),
    )  # fmt: skip
    return [*found.command.arguments[4:], *found.command.files.values()]


def value(arguments: list[str], flag: str) -> str | None:
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


@pytest.mark.parametrize(("gpus", "size"), [(1, 1), (2, 2), (3, 2), (4, 4), (8, 4)], ids=lambda count: f"{count}")
def test_gpus_that_divide_every_head(full: Facts, gpus: int, size: int) -> None:
    """32 heads of the decoder, 16 and 20 of the towers: 8 does not divide 20."""
    chosen, _, reasons = choose_parallel(full, gpus, None)
    assert chosen == size
    assert (gpus == size) or any("stay free" in reason for reason in reasons)


def test_experts_are_spread_whole_where_they_cannot_be_divided(full: Facts) -> None:
    """768 / 2 and 768 / 4 are multiples of 64; of a narrower expert a quarter is none."""
    assert choose_parallel(full, 4, 4)[1] is False
    narrow = json.loads(json.dumps(full.config))
    narrow["thinker_config"]["text_config"]["moe_intermediate_size"] = 384
    from dataclasses import replace

    changed = facts_of(replace(full.checkpoint, config=narrow))
    size, spread, reasons = choose_parallel(changed, 4, 4)
    assert (size, spread) == (4, True)
    assert any("384 / 4 is no multiple of 64" in reason for reason in reasons)


def test_a_size_that_divides_nothing_is_refused(full: Facts) -> None:
    with pytest.raises(OmniFP4Error, match="tensor parallel size 8 does not divide"):
        choose_parallel(full, 8, 8)
    assert not can_divide(full, 3)


def placed(full: Facts, engine: str, *gpus: Accelerator, **options: Any) -> Placement:
    return place(full, machine(*gpus), engine, Options(**options))


def test_context_is_what_the_memory_holds(full: Facts) -> None:
    """98,304 bytes of cache a token; the model's own limit is 65,536."""
    assert placed(full, "vllm", gpu()).context_tokens == 65_536
    small = placed(full, "vllm", gpu(memory=30 * GB))
    weights = full.checkpoint.weight_bytes - full.parts["speech"]
    left = 27 * GB - 4 * GB - int(weights * 1.05)
    assert small.context_tokens == left // 98_304 // 1024 * 1024
    with pytest.raises(OmniFP4Error, match="do not fit"):
        placed(full, "vllm", gpu(memory=24 * GB))
    # Two of them hold it.
    assert placed(full, "vllm", gpu(memory=24 * GB), gpu(memory=24 * GB)).tensor_parallel == 2
    with pytest.raises(OmniFP4Error, match="more than the model's"):
        placed(full, "vllm", gpu(), max_model_len=100_000)


def test_what_others_hold_is_left_to_them(full: Facts) -> None:
    found = placed(full, "vllm", gpu(free=90 * GB))
    assert found.utilization == 0.58
    assert any("other programs hold the rest" in reason for reason in found.reasons)
    assert placed(full, "vllm", gpu(), gpu_memory_utilization=0.5).utilization == 0.5


@pytest.mark.parametrize(
    ("count", "devices", "size"),
    [(1, ["0", "0", "0"], 1), (2, ["0", "1", "1"], 1), (3, ["0,1", "2", "2"], 2), (4, ["0,1", "2", "3"], 2), (6, ["0,1,2,3", "4", "5"], 4)],
)  # fmt: skip
def test_stages_on_gpus(full: Facts, count: int, devices: list[str], size: int) -> None:
    found = placed(full, "vllm-omni", *[gpu()] * count)
    assert [",".join(map(str, stage.devices)) for stage in found.stages] == devices
    assert found.tensor_parallel == size
    taken: dict[int, float] = {}
    for stage in found.stages:
        for device in stage.devices:
            taken[device] = taken.get(device, 0.0) + stage.utilization
    assert all(0 < share <= 0.901 for share in taken.values())


def test_an_artifact_without_talker_has_one_stage(full: Facts) -> None:
    from dataclasses import replace

    config = {**full.config, "enable_audio_output": False}
    found = place(facts_of(replace(full.checkpoint, config=config)), machine(gpu(), gpu()), "vllm-omni", Options())
    assert len(found.stages) == 1


def test_plain_vllm_is_given_no_method(compressed: Path) -> None:
    arguments = prepared(compressed, "vllm", gpu())
    assert "--quantization" not in arguments and "-q" not in arguments
    assert value(arguments, "--moe-backend") == "marlin"
    assert value(arguments, "--seed") == "0"


@pytest.mark.parametrize(
    ("capability", "options", "backend"),
    [("9.0", {}, "marlin"), ("8.0", {}, "marlin"), ("10.0", {}, "marlin"), ("12.0", {}, "marlin"), ("9.0", {"emulate": True}, "emulation")],
)  # fmt: skip
def test_stages_have_backends_that_nvfp4_accepts(
    capability: str, options: dict[str, bool], backend: str, modelopt: Path
) -> None:
    """W4A16 is Marlin's everywhere; a BF16 talker must not be given it."""
    deploy = prepared(modelopt, "vllm-omni", gpu(capability), **options)[-1]
    assert re.findall(r'moe_backend: "(\w+)"', deploy) == [backend, "auto"]
    assert "triton" not in deploy
    assert deploy.count('"seed": 0') == 3
    # 300 s of speech at 12.5 frames a second.
    assert '"max_tokens": 3750' in deploy


def test_w4a4_runs_on_fp4_units_where_there_are_some(full: Facts) -> None:
    from dataclasses import replace

    from omnifp4.checkpoint.dialects import MODELOPT, Activations
    from omnifp4.handover.command import moe_backend

    config = {**full.config, "quantization_config": MODELOPT.quantization_config(Activations.FP4, [], {})}
    facts = facts_of(replace(full.checkpoint, config=config))
    assert moe_backend(facts, machine(gpu("10.0")), "thinker", Options())[0] == "auto"
    chosen, why = moe_backend(facts, machine(gpu("9.0")), "thinker", Options())
    assert chosen == "marlin" and "W4A4 runs as W4A16" in why


def test_printing_runs_and_writes_nothing(modelopt: Path, tmp_path: Path, here: Here) -> None:
    here(gpu())
    talk = Heard()
    cache = tmp_path / "cache"
    status = serve_with(str(modelopt), "vllm", host="0.0.0.0", port=1, print_only=True, options={"cache": cache}, talk=talk)  # fmt: skip
    assert status == 0
    assert not cache.exists()
    assert "omnifp4 convert" in talk.text and "--host 0.0.0.0 --port 1 " in talk.text
    assert "no environment with vllm is known" in talk.text


def test_an_unknown_option_engine_or_model_is_refused(compressed: Path) -> None:
    def run(model: str = str(compressed), engine: str = "vllm", **options: Any) -> int:
        return serve_with(model, engine, host="127.0.0.1", port=1, print_only=True, options=options)

    with pytest.raises(OmniFP4Error, match="option 'quantization' is unknown"):
        run(quantization="fp4")
    with pytest.raises(OmniFP4Error, match="engine 'sglang' is unknown"):
        run(engine="sglang")
    with pytest.raises(OmniFP4Error, match="neither a local folder nor a Hub id"):
        run(model="/nowhere/at/all")
    with pytest.raises(OmniFP4Error, match="GPU memory utilization 2"):
        run(gpu_memory_utilization=2.0)
    assert read_options({"python": None, "extra": ["--x"]}) == Options(extra=("--x",))


def test_an_artifact_that_no_engine_reads_is_refused(tmp_path: Path, compressed: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(compressed, broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(OmniFP4Error, match="vLLM cannot read it"):
        serve_with(str(broken), "vllm", host="127.0.0.1", port=1, print_only=True)


def test_marlin_widths(full: Facts) -> None:
    from dataclasses import replace

    assert marlin_problem(full) == ""
    assert marlin_padding(full) == ""
    module = "thinker.model.layers.0.mlp.experts.0.up_proj"
    linear = full.fp4[module]
    odd = facts_of(full.checkpoint)
    odd.__dict__["fp4"] = {module: replace(linear, packed=replace(linear.packed, shape=(400, 528)))}
    assert "hidden width 1056 is no multiple of 64" in marlin_problem(odd)
    assert "is 400 x 1056: Marlin pads" in marlin_padding(odd)


def test_numbers_that_vllm_omni_does_not_read_are_told(full: Facts, compressed: Path) -> None:
    assert speech_problem(full) == ""
    found = prepare(
        str(compressed), "vllm-omni", Options(cache=Path("/cache")), host="127.0.0.1", port=8000, print_only=True,
        output=Heard(), machine=machine(gpu()),
    )  # fmt: skip
    (note,) = [note for note in found.notes if "speech may fail" in note]
    tiny = json.loads((compressed / "config.json").read_text())
    assert f"accept_hidden_layer {tiny['talker_config']['accept_hidden_layer']}, not 24" in note
    assert f"user_token_id {tiny['user_token_id']}, not 872" in note


def test_gpus_of_other_hosts_count_as_like_ours(full: Facts) -> None:
    found = placed(full, "vllm", gpu(memory=24 * GB), tensor_parallel=2)
    assert found.tensor_parallel == 2 and found.context_tokens > 1024
    assert any("other hosts" in reason for reason in found.reasons)


def test_log_lines_of_blackwell_and_of_stages() -> None:
    lines = [
        "\x1b[1;36m(Worker_TP0 pid=9)\x1b[0;0m INFO x Using 'FLASHINFER_TRTLLM' NvFp4 MoE backend out of potential backends: ['MARLIN'].",
        "INFO x Using FlashInferCutlassNvFp4LinearKernel for NVFP4 GEMM",
        "[Stage-0] INFO Model loading took 17.2 GiB memory and 3.1 seconds",
        "[Stage-1] INFO Model loading took 6.5 GiB memory and 3.1 seconds",
        "WARNING NVFP4 linear falling back to the slow and unoptimized emulation backend as no optimized backend is available",
    ]
    used = {(use.part, use.kernel): (use.arithmetic, use.slow) for use in kernels_used(lines)}
    assert used == {
        ("experts", "FLASHINFER_TRTLLM"): ("W4A4", False),
        ("linears", "FlashInferCutlassNvFp4LinearKernel"): ("W4A4", False),
        ("linears", "emulation"): ("emulated", True),
    }
    assert {row.stage: row.weights_gib for row in memory_told(lines)} == {"stage 0": 17.2, "stage 1": 6.5}
    assert step_of("Loading safetensors checkpoint shards:  40% Completed | 2/5") == "loading weights, 40%"
    assert step_of("INFO: Application startup complete.") == "ready"
    assert step_of("nothing of the kind") == ""
