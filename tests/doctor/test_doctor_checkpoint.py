"""Memory fit, misuse, soundness, and what is shown of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.doctor import examine, run_doctor
from omnifp4.doctor.facts import Kind, facts_of, read_facts
from omnifp4.doctor.fit import fit_model, list_loads, read_sizes
from omnifp4.doctor.misuse import find_misuse
from omnifp4.doctor.scales import check_scales
from omnifp4.doctor.text import diagnosis_text, doctor_text
from omnifp4.errors import CheckpointError, OmniFP4Error
from omnifp4.models import layout_for
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.diagnosis import DiagnosisReceipt
from omnifp4.receipt.doctor import DoctorReceipt, Machine, Severity
from omnifp4.tiny import released_config, tiny_config

CopyOf = Callable[..., Path]
MACHINE = Machine(
    python="3.11",
    system="Linux",
    machine="x86_64",
    cores=2,
    ram_bytes=64 * 10**9,
    ram_free_bytes=64 * 10**9,
    torch_build="CPU",
    torch_problem="",
    accelerators=(),
)


@pytest.fixture(scope="module")
def released() -> Checkpoint:
    """Headers of the released model's shapes in BF16, without a file."""
    config = released_config("qwen3-omni-30b-a3b")
    tensors, position = {}, 0
    for spec in layout_for(config).tensors:
        if not spec.optional:
            tensors[spec.name] = TensorEntry(
                spec.name, "s", "BF16", spec.shape, position, position + 2 * spec.parameters
            )
            position += 2 * spec.parameters
    return Checkpoint("released", config, tensors, {"s": position})


def test_cache_of_the_released_model() -> None:
    text, talker = read_sizes(released_config("qwen3-omni-30b-a3b"))
    assert text is not None and talker is not None
    assert text.kv_bytes_per_token == 98_304
    assert talker.kv_bytes_per_token == 20_480
    assert text.prefill_bytes_per_token > 2 * text.vocabulary


def test_weights_of_the_released_model(released: Checkpoint) -> None:
    loads = {load.name: load for load in list_loads(facts_of(released))}
    assert loads["text decoder"].weight_bytes == pytest.approx(61.1e9, rel=2e-3)
    assert loads["all parts, with speech"].weight_bytes == pytest.approx(70.5e9, rel=2e-3)


@pytest.mark.parametrize(("size_gb", "fits"), [(48, False), (80, True), (141, True)])
def test_what_fits(released: Checkpoint, size_gb: int, fits: bool) -> None:
    fit = fit_model(facts_of(released), MACHINE, size_gb * 10**9)
    assert fit is not None
    rows = {(row.loaded, row.batch): row for row in fit.rows if "GPU" in row.device}
    one, many = rows["text decoder + towers", 1], rows["text decoder + towers", 16]
    assert (one.most_tokens > 4096) is fits
    assert many.most_tokens <= one.most_tokens <= fit.model_context == 65_536
    assert (one.needed_bytes <= one.device_bytes) is fits
    whole = next(tier for tier in fit.tiers if tier.loaded == "all parts, with speech")
    assert (whole.tier, whole.smallest_device_gb) == ("over 30 GiB", 80)
    assert any("98,304 bytes a token" in line for line in fit.rule)


def test_needs_grow_with_context_and_batch(released: Checkpoint) -> None:
    load = list_loads(facts_of(released))[0]
    assert load.needed_bytes(0, 2, 100) - load.needed_bytes(0, 1, 100) == 100 * load.bytes_per_token
    most = load.most_tokens(80 * 10**9, 0, 1, 0)
    assert load.needed_bytes(0, 1, most) <= 80 * 10**9 < load.needed_bytes(0, 1, most + 1)


def misuse(folder: Path) -> dict[str, str]:
    return {
        item.name: item.finding for item in find_misuse(read_facts(str(folder))) if item.severity is Severity.PROBLEM
    }


def test_good_checkpoints_raise_no_concern(tiny: Path, nvfp4: Path, compressed: Path) -> None:
    for folder in (tiny, nvfp4, compressed):
        assert find_misuse(read_facts(str(folder))) == ()


def test_float16_in_the_config(nvfp4: Path, tiny: Path, copy_of: CopyOf) -> None:
    found = misuse(copy_of(nvfp4, dtype="float16"))
    assert "config.json says dtype float16" in found["config.dtype"]


def test_float16_of_a_wide_checkpoint_is_its_own_matter(tiny: Path, copy_of: CopyOf) -> None:
    assert misuse(copy_of(tiny, torch_dtype="float16")) == {}


@pytest.mark.parametrize(
    ("without", "name"),
    [
        (("chat_template.jinja",), "files.chat-template"),
        (("vocab.json", "tokenizer_config.json"), "files.tokenizer"),
        (("preprocessor_config.json",), "files.processor"),
    ],
)
def test_missing_files(nvfp4: Path, copy_of: CopyOf, without: tuple[str, ...], name: str) -> None:
    assert name in misuse(copy_of(nvfp4, without))


def test_tokenizer_without_chatml(nvfp4: Path, copy_of: CopyOf) -> None:
    folder = copy_of(nvfp4)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({k: v for k, v in vocabulary.items() if not k.startswith("<|im_")}))
    assert "does not know <|im_start|> and <|im_end|>" in misuse(folder)["files.tokenizer"]


def test_roles_with_other_ids(nvfp4: Path, copy_of: CopyOf) -> None:
    folder = copy_of(nvfp4, assistant_token_id=5)
    assert "assistant_token_id 5" in misuse(folder)["files.tokenizer"]


def test_random_talker(tiny: Path) -> None:
    """What disable_talker() and save_pretrained() leave."""
    whole = read_facts(str(tiny)).checkpoint
    silent = {n: entry for n, entry in whole.tensors.items() if not n.startswith(("talker.", "code2wav."))}
    facts = facts_of(Checkpoint(str(tiny), whole.config, silent, whole.shard_bytes, tiny))
    assert facts.speech_is_random
    (found,) = find_misuse(facts)
    assert (found.name, found.severity) == ("config.speech", Severity.PROBLEM)
    assert "random weights" in found.finding
    told = Checkpoint(str(tiny), {**whole.config, "enable_audio_output": False}, silent, whole.shard_bytes, tiny)
    assert find_misuse(facts_of(told)) == ()


def test_statistics_beside_wide_weights(tiny: Path, copy_of: CopyOf) -> None:
    """The seeds' 66 GB in, 66 GB out."""
    folder = copy_of(tiny)
    facts = read_facts(str(folder))
    name = "thinker.model.layers.0.self_attn.q_proj.weight_quantizer._amax"
    entry = TensorEntry(name, "model.safetensors", "BF16", (), 0, 2)
    changed = facts_of(
        Checkpoint(
            str(folder), facts.config, {**facts.checkpoint.tensors, name: entry}, facts.checkpoint.shard_bytes, folder
        )
    )
    assert changed.kind is Kind.AMAX_ONLY
    (found,) = find_misuse(changed)
    assert (found.name, found.severity) == ("weights.not-packed", Severity.PROBLEM)
    assert found.finding.startswith("1.00x")
    assert changed.parts == facts.parts


def test_kinds(tiny: Path, nvfp4: Path, compressed: Path, copy_of: CopyOf) -> None:
    assert read_facts(str(tiny)).kind is Kind.WIDE
    assert read_facts(str(nvfp4)).kind is Kind.NVFP4
    assert read_facts(str(compressed)).dialect == "compressed-tensors"
    claimed = read_facts(str(copy_of(tiny, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})))
    assert claimed.kind is Kind.CLAIM_ONLY


def test_other_quantizations_are_not_judged(tiny: Path, copy_of: CopyOf) -> None:
    receipt = examine(str(copy_of(tiny, quantization_config={"quant_method": "awq", "bits": 4})))
    assert receipt.checkpoint is not None
    assert (receipt.checkpoint.kind, receipt.checkpoint.sound) == ("other", True)


def test_missing_tensors_are_found(tiny: Path, copy_of: CopyOf) -> None:
    folder = copy_of(tiny)
    config = json.loads((folder / "config.json").read_text())
    config["thinker_config"]["text_config"]["num_hidden_layers"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    receipt = run_doctor(str(folder))
    assert receipt.checkpoint is not None and not receipt.checkpoint.sound
    assert not receipt.can_run
    assert "are missing" in receipt.checkpoint.checks[0].summary


@pytest.mark.parametrize(("value", "told"), [(np.nan, "is nan"), (-6.6e-34, "is -6.6e-34"), (2.5e30, "is 2.5e+30")])
def test_garbage_scales_are_found(nvfp4: Path, copy_of: CopyOf, value: float, told: str) -> None:
    """What tools have left in tensor scales without a word."""
    folder = copy_of(nvfp4)
    facts = read_facts(str(folder))
    module = "thinker.model.layers.0.self_attn.q_proj"
    overwrite(folder, facts.fp4[module].tensor_scale, value)
    receipt = examine(str(folder))
    assert receipt.checkpoint is not None and not receipt.can_run
    check = next(check for check in receipt.checkpoint.checks if check.name == "scales.sane")
    assert check.verdict is Verdict.FAIL
    assert module in check.findings[0] and told in check.findings[0]


def test_scales_of_gate_and_up_must_be_one(compressed: Path, copy_of: CopyOf) -> None:
    folder = copy_of(compressed)
    facts = read_facts(str(folder))
    overwrite(folder, facts.fp4["thinker.model.layers.1.mlp.experts.3.up_proj"].tensor_scale, 3248.0)
    assert "kernels take one for both" in check_scales(read_facts(str(folder))).findings[0]
    assert check_scales(read_facts(str(compressed))).verdict is Verdict.PASS


def overwrite(folder: Path, entry: TensorEntry | None, value: float) -> None:
    assert entry is not None
    with (folder / entry.shard).open("r+b") as file:
        file.seek(entry.begin)
        file.write(np.float32(value).tobytes())


def test_names_of_transformers_in_memory() -> None:
    config = {**tiny_config()["thinker_config"], "model_type": "qwen3_omni_moe_thinker"}
    names = {spec.name: spec.shape for spec in layout_for(config).tensors if not spec.optional}
    prefix = "model.language_model."
    renamed = {n.replace("model.", prefix, 1) if n.startswith("model.layers") else n: s for n, s in names.items()}
    renamed = {n.replace("model.embed", f"{prefix}embed").replace("model.norm", f"{prefix}norm"): s for n, s in renamed.items()}  # fmt: skip

    def facts(shapes: dict[str, tuple[int, ...]]) -> bool:
        entries = {n: TensorEntry(n, "s", "BF16", shape, 0, 0) for n, shape in shapes.items()}
        return facts_of(Checkpoint("memory", config, entries, {})).has_memory_names

    assert facts(renamed)
    assert not facts(names)
    assert not facts(dict(list(renamed.items())[1:]))


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        examine(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError):
        examine(str(tmp_path))
    with pytest.raises(OmniFP4Error, match="device memory 0"):
        examine(device_memory=0)


def shown(receipt: DoctorReceipt | DiagnosisReceipt) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(doctor_text(receipt) if isinstance(receipt, DoctorReceipt) else diagnosis_text(receipt))
    return console.export_text()


def test_doctor_is_shown(nvfp4: Path) -> None:
    text = shown(examine(str(nvfp4), device_memory=24 * 10**9))
    for words in ("longest context", "omnifp4 chat", "vllm serve", "B: reads the original only", "a GPU of 24 GB", "KV cache:"):  # fmt: skip
        assert words in text
    assert DoctorReceipt.model_validate_json(examine(str(nvfp4)).model_dump_json()).model == str(nvfp4)


def test_diagnosis_is_shown(tmp_path: Path) -> None:
    from omnifp4.doctor import diagnose

    script = tmp_path / "s.py"
    script.write_text("raise MemoryError('[x] no room')\n")
    receipt = diagnose(script)
    text = shown(receipt)
    for words in ("failed after", "memory.host", "why:", "seen: MemoryError: [x] no room", "fix:"):
        assert words in text
    assert DiagnosisReceipt.model_validate_json(receipt.model_dump_json()) == receipt
    assert np.isfinite(receipt.seconds)
