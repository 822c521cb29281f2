"""Models of text alone: Qwen3-MoE, Qwen3 and Llama, with their own tokenizer and nothing that they cannot read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_model import Seen

from omnifp4.errors import OmniFP4Error
from omnifp4.tiny import write_random_checkpoint
from omnifp4.tiny.checkpoint import asset_bytes
from small_checkpoints import fused, read_tensors, write_checkpoint

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")

DECODER = {
    "vocab_size": 2080, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "max_position_embeddings": 4096, "rope_theta": 10000.0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False} | DECODER | EXPERTS,
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True} | DECODER,
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False} | DECODER,
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def text_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under each type's names, with the tiny model's tokenizer."""
    folder = write_random_checkpoint(
        {"model_type": request.param, **CONFIGS[request.param]}, tmp_path_factory.mktemp("text") / request.param
    )
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).write_bytes(asset_bytes(name))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key != "processor_class"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    if request.param != "llama":
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_the_inputs_are_those_of_the_whole_model(
    text_model: Path, calibrate: Callable[..., Any], tmp_path: Path
) -> None:
    from omnifp4.calibration.conversations import open_set
    from omnifp4.calibration.encoding import open_reader
    from omnifp4.calibration.statistics import open_statistics
    from omnifp4.checkpoint.folder import open_checkpoint

    receipt = calibrate(text_model, tmp_path / "out", samples=8, speech=None)
    assert receipt.left_out == {"image": 2, "audio": 2, "mixed": 2}
    assert receipt.samples == 2
    assert set(receipt.tokens) == {"text"}
    checkpoint = open_checkpoint(text_model)
    reader = open_reader(checkpoint)
    read = [one for one in open_set("bundled", samples=8).samples if one.modality == "text"]
    sequences = [reader.encode(one) for one in read]
    seen = Seen(text_model, sequences, torch.bfloat16)
    moe = checkpoint.config["model_type"] == "qwen3_moe"
    with open_statistics(tmp_path / "out", text_model) as statistics:
        found = statistics.of("model.layers.1.self_attn.k_proj.weight")
        assert found.tokens == sum(receipt.tokens.values())
        torch.testing.assert_close(found.abs_mean, seen.inputs["qkv"].float().abs().mean(0), rtol=1e-5, atol=0)
        if moe:
            routed = seen.routed(2)
            assert receipt.experts[1].tokens[2] == len(routed) >= 64
            found = statistics.of("model.layers.1.mlp.experts.2.up_proj.weight")
            torch.testing.assert_close(found.square_mean, routed.float().square().mean(0), rtol=1e-5, atol=0)
        else:
            assert receipt.experts == ()
            gate = statistics.of("model.layers.1.mlp.gate_proj.weight")
            torch.testing.assert_close(gate.abs_mean, seen.inputs["gate_up"].float().abs().mean(0), rtol=1e-5, atol=0)
            assert "model.layers.0.mlp.down_proj.weight" in statistics
        tied = checkpoint.config["tie_word_embeddings"]
        assert len(statistics.names()) == 2 * (4 + (12 if moe else 3)) + (0 if tied else 1)
        assert ("lm_head.weight" in statistics) is not tied


def test_hessians(text_model: Path) -> None:
    from omnifp4.calibration.hessians import visit_layers

    shapes: dict[str, tuple[int, ...]] = {}

    def visitor(_: str, inputs: Any) -> None:
        shapes.update({name: tuple(inputs.hessian(name).shape) for name in inputs.names if inputs.tokens(name)})

    visit_layers(text_model, "bundled", visitor, samples=8)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (64, 64)
    assert len(shapes) == 2 * (4 + (12 if "qwen3_moe" in str(text_model) else 3))


def test_gradients(
    text_model: Path, calibrate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without a head of its own is refused before the layers are run, and leaves nothing."""
    from omnifp4.calibration import capture
    from omnifp4.calibration.statistics import open_statistics

    out, options = tmp_path / "out", {"samples": 8, "speech": None, "gradients": True}
    if CONFIGS[text_model.name]["tie_word_embeddings"]:
        monkeypatch.setattr(capture, "run_layers", lambda *_, **__: pytest.fail("layers were run"))
        with pytest.raises(OmniFP4Error, match=r"no head of its own.*\(leave --gradients out\)"):
            calibrate(text_model, out, **options)
        assert not list(tmp_path.iterdir())
        return
    calibrate(text_model, out, **options)
    with open_statistics(out, text_model) as statistics:
        found = statistics.gradient("model.layers.1.self_attn.o_proj.weight")
        torch.testing.assert_close(found.rows.sum(), found.columns.sum(), rtol=1e-4, atol=0)
        assert float(found.rows.sum()) > 0


def test_what_it_cannot_read(
    text_model: Path, calibrate: Callable[..., Any], write_lines: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    data = write_lines(
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "answer": "a"}
    )
    with pytest.raises(OmniFP4Error, match=r"none of its 1 conversations can be read by a .* \(it reads text\)"):
        calibrate(text_model, tmp_path / "out", data=data, samples=None)
    with pytest.raises(OmniFP4Error, match="--speech was asked for: the checkpoint has no talker"):
        calibrate(text_model, tmp_path / "out", speech=True)


def test_fused_experts_on_disk(calibrate: Callable[..., Any], tmp_path: Path) -> None:
    """The same model with its experts as 3-D tensors gives the same statistics, under the names of single experts."""
    from omnifp4.calibration.statistics import open_statistics

    config = {"model_type": "qwen3_moe", **CONFIGS["qwen3_moe"]}
    single = write_random_checkpoint(config, tmp_path / "single")
    tensors = read_tensors(single)
    together = write_checkpoint(tmp_path / "together", config, fused(config, tensors, transposed=False))
    for folder in (single, together):
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (folder / name).write_bytes(asset_bytes(name))
    for folder in (single, together):
        calibrate(folder, tmp_path / f"{folder.name}.statistics", samples=4)
    with (
        open_statistics(tmp_path / "single.statistics") as one,
        open_statistics(tmp_path / "together.statistics", together) as other,
    ):
        assert one.names() == other.names()
        assert one.receipt.tensors == other.receipt.tensors
