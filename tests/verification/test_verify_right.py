"""Right artifacts pass every check that can be done, and what cannot be done is not called passed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from verify_artifacts import COMPRESSED, MODELOPT, Artifact, assert_fails, check_of, load_folder, quantize

import omnifp4.verification as package
from omnifp4.errors import ModelError, OmniFP4Error
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.receipt.base import Verdict
from omnifp4.tiny import write_random_checkpoint
from omnifp4.verification import verify

NEEDS_SOURCE = {"files.side", "config.source", "values.error", "values.untouched"}


@pytest.mark.parametrize("dialect", [MODELOPT, COMPRESSED])
@pytest.mark.parametrize("w4a4", [False, True])
def test_right_artifact(made, judge, source_folder, dialect, w4a4):
    receipt = judge(made[dialect, w4a4].copy(), source_folder)
    assert_fails(receipt, set())
    assert {c.name for c in receipt.checks if c.verdict is Verdict.NOT_CHECKED} == {"shards.checksums"}
    assert receipt.dialect == dialect
    assert receipt.activations == ("W4A4" if w4a4 else "W4A16")
    assert receipt.model_type == "qwen3_omni_moe"
    assert receipt.fp4_linears == 2 * (4 + 3 * 8)
    assert 0.007 < receipt.relative_squared_error < 0.0105
    assert receipt.worst_tensors[0].relative_squared_error >= receipt.relative_squared_error
    assert receipt.compression_ratio > 1.1
    assert receipt.seconds > 0


def test_without_source_values_are_not_checked(modelopt, judge):
    receipt = judge(modelopt)
    assert receipt.verdict is Verdict.PASS
    not_checked = {check.name for check in receipt.checks if check.verdict is Verdict.NOT_CHECKED}
    assert not_checked == NEEDS_SOURCE | {"shards.checksums"}
    assert receipt.relative_squared_error is None


def test_several_shards_and_threads(compressed, source_folder, tmp_path):
    folder = compressed.write(tmp_path / "artifact", shards=3)
    seen = []
    one = verify(folder, against=source_folder, threads=1)
    many = verify(folder, against=source_folder, threads=4, progress=lambda *step: seen.append(step))
    assert one.verdict is many.verdict is Verdict.PASS
    assert [c.model_dump() for c in one.checks] == [c.model_dump() for c in many.checks]
    assert one.worst_tensors == many.worst_tensors
    assert all(done <= total for done, total, _ in seen)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {what for _, _, what in seen} == {"scales", "values", "untouched tensors"}


def test_own_receipt(modelopt, judge, source_folder):
    modelopt.side["omnifp4.json"] = modelopt.receipt()
    receipt = judge(modelopt, source_folder)
    assert_fails(receipt, set())
    assert check_of(receipt, "shards.checksums").verdict is Verdict.PASS


def test_sweep_is_better(wide, judge, source_folder):
    receipt = judge(quantize(wide, MODELOPT, rule=ScaleRule.SWEEP), source_folder)
    assert_fails(receipt, set())
    assert receipt.relative_squared_error < 0.0075


def thinker_alone(artifact: Artifact) -> Artifact:
    """As llm-compressor saves it: the prefix gone, the thinker's own config, full names in ignore."""
    alone = artifact.copy()
    alone.tensors = {
        name.removeprefix("thinker."): stored for name, stored in alone.tensors.items() if name.startswith("thinker.")
    }
    config = alone.config["thinker_config"] | {"model_type": "qwen3_omni_moe_thinker"}
    config["quantization_config"] = artifact.config["quantization_config"]
    alone.config = config
    return alone


def test_thinker_alone(compressed, judge, source_folder):
    receipt = judge(thinker_alone(compressed), source_folder)
    assert_fails(receipt, set())
    assert receipt.model_type == "qwen3_omni_moe_thinker"
    assert receipt.relative_squared_error < 0.0105


def test_names_of_transformers_in_memory(modelopt, judge):
    """ModelOpt on Transformers 5.23 saves the thinker under names that no engine finds."""
    artifact = thinker_alone(modelopt)
    artifact.tensors = {
        f"model.{n}".replace("model.model.", "model.language_model."): s for n, s in artifact.tensors.items()
    }
    receipt = judge(artifact)
    assert_fails(receipt, {"tensors.complete"}, "Transformers in memory", "model.language_model.layers.0")


def small(model_type: str, **extra: object) -> dict[str, object]:
    return {
        "model_type": model_type,
        "architectures": ["X"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        **extra,
    }


MOE = {"num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [0]}


@pytest.mark.parametrize(
    "config", [small("qwen3"), small("llama"), small("qwen3_moe", **MOE)], ids=lambda c: c["model_type"]
)
@pytest.mark.parametrize(
    ("dialect", "router"), [(MODELOPT, "model.layers.1.mlp.gate"), (COMPRESSED, r"re:.*model\.layers\.1\.mlp\.gate$")]
)
def test_siblings(config, dialect, router, tmp_path, judge):
    source = write_random_checkpoint(config, tmp_path / "source")
    ignore = ["lm_head", router] if "num_experts" in config else ["lm_head"]
    assert_fails(judge(quantize(load_folder(source), dialect, ignore=ignore), source), set())


def test_dense_gate_projection_hit_by_a_router_entry(tmp_path, judge):
    """In layer 0, a dense one, ``mlp.gate`` is a part of ``mlp.gate_proj``: ModelOpt's rules exclude it."""
    source = write_random_checkpoint(small("qwen3_moe", **MOE), tmp_path / "source")
    artifact = quantize(load_folder(source), MODELOPT, ignore=["lm_head", "model.layers.0.mlp.gate", "*.1.mlp.gate"])
    assert_fails(judge(artifact), {"ignore"}, "model.layers.0.mlp.gate_proj")


def test_key_value_scales_need_their_claim(modelopt, judge):
    name = "thinker.model.layers.0.self_attn.k_proj.k_scale"
    modelopt.tensors[name] = ("F32", (), b"\0\0\x80\x3f")
    assert_fails(judge(modelopt), {"tensors.complete"}, name)
    modelopt.quantization["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    assert_fails(judge(modelopt), set())


def test_mixed_precision(modelopt, judge):
    algorithm = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    layers = {}
    for layer in range(2):
        stem = f"thinker.model.layers.{layer}"
        layers |= {f"{stem}.self_attn.{part}_proj": algorithm for part in "qkvo"}
        layers[f"{stem}.mlp.experts"] = algorithm
    quantization = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    modelopt.config["quantization_config"] = quantization
    assert_fails(judge(modelopt), set())
    del layers["thinker.model.layers.1.self_attn.o_proj"]
    assert_fails(judge(modelopt), {"ignore"}, "thinker.model.layers.1.self_attn.o_proj")


def test_auto_rounds_own_config(compressed_w4a4, judge):
    compressed_w4a4.config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:llm_compressor",
        "bits": 4,
        "data_type": "nv_fp",
        "group_size": 16,
        "block_name_to_quantize": "thinker.model.layers",
        "extra_config": {r".*thinker\.model\.layers\.\d+\.mlp\.gate$": {"bits": 16}},
    }
    receipt = judge(compressed_w4a4)
    assert_fails(receipt, set())
    assert check_of(receipt, "ignore.engines").verdict is Verdict.NOT_CHECKED
    assert "vLLM refuses" in check_of(receipt, "config.scheme").summary


def test_unknown_model_is_refused(modelopt, judge):
    modelopt.config["model_type"] = "gpt2"
    with pytest.raises(ModelError, match="qwen3_omni_moe"):
        judge(modelopt)


def test_threads_must_be_positive(source_folder):
    with pytest.raises(OmniFP4Error, match="threads"):
        verify(source_folder, threads=0)


def test_proof_shares_no_code_with_the_quantizer():
    allowed = {"formats", "checkpoint", "models", "receipt", "errors", "verification"}
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in filter(None, names):
                assert name.split(".")[0] != "torch"
                assert not name.startswith("omnifp4") or name.split(".")[1] in allowed, f"{path.name} imports {name}"


def test_neither_torch_nor_numba_without_need(modelopt, tmp_path):
    folder = modelopt.write(tmp_path / "artifact")
    code = (
        "import sys, json; from omnifp4.verification import verify; from pathlib import Path; "
        "r = verify(Path(sys.argv[1])); "
        "print(json.dumps([r.verdict, 'torch' in sys.modules, 'numba' in sys.modules, 'omnifp4.quantization' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["pass", False, False, False]
