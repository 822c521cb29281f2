"""Layers shown with their inputs: Hessians, samples and weights are the model's, and replaced weights take part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omnifp4.errors import OmniFP4Error
from small_checkpoints import read_tensors

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")

LAYER = "thinker.model.layers.1"


@pytest.fixture(scope="module")
def shown(tiny_omni: Path, sequences: list[Any], seen: Any) -> dict[str, Any]:
    """What the visitor read of the second layer, and the receipt."""
    from omnifp4.calibration.hessians import visit_layers

    found: dict[str, Any] = {"names": []}

    def visitor(name: str, inputs: Any) -> None:
        found["names"].append((name, inputs.layer, inputs.layers, len(inputs.names)))
        if name != LAYER:
            return
        for weight in inputs.names:
            found[weight] = {
                "weight": inputs.weight(weight).clone(), "hessian": inputs.hessian(weight),
                "samples": inputs.samples(weight).clone(), "statistics": inputs.statistics(weight),
                "tokens": inputs.tokens(weight), "source": inputs.source(weight),
            }  # fmt: skip
        assert inputs.source("thinker.lm_head.weight") == "none"
        with pytest.raises(OmniFP4Error, match=r"layer 1 has no inputs of 'thinker.lm_head.weight'"):
            inputs.hessian("thinker.lm_head.weight")

    found["receipt"] = visit_layers(tiny_omni, "bundled", visitor, samples=len(sequences), sample_inputs=50)
    return found


def test_hessians_and_samples(shown: dict[str, Any], seen: Any) -> None:
    assert shown["names"] == [(f"thinker.model.layers.{number}", number, 4, 28) for number in range(4)]
    expected = {f"{LAYER}.self_attn.{part}_proj.weight": seen.inputs["qkv"] for part in "qkv"}
    expected[f"{LAYER}.self_attn.o_proj.weight"] = seen.inputs["o_proj"]
    for expert in range(8):
        inputs = seen.routed(expert)
        name = f"{LAYER}.mlp.experts.{expert}"
        if len(inputs) >= 64:
            expected |= {f"{name}.gate_proj.weight": inputs, f"{name}.up_proj.weight": inputs}
            inner = seen.inner(expert, inputs).double()
            found = shown[f"{name}.down_proj.weight"]
            reference = inner.T @ inner / len(inner)
            assert (found["hessian"].double() - reference).norm() / reference.norm() < 0.01
    assert len(expected) > 10
    for name, inputs in expected.items():
        found, x = shown[name], inputs.double()
        assert (found["tokens"], found["source"]) == (len(x), "routed")
        hessian = found["hessian"]
        assert hessian.dtype == torch.float32
        torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(hessian, hessian.T)
        step = -(-len(x) // 50)
        assert torch.equal(found["samples"], inputs[::step])
        assert len(found["samples"]) <= 50
        torch.testing.assert_close(hessian.diagonal(), found["statistics"].square_mean, rtol=1e-5, atol=0)


def test_weights_are_those_on_disk(shown: dict[str, Any], tiny_omni: Path) -> None:
    tensors = read_tensors(tiny_omni)
    for name, found in shown.items():
        if name.startswith(LAYER):
            assert torch.equal(found["weight"].float(), torch.from_numpy(tensors[name].values)), name


def test_receipt(shown: dict[str, Any], seen: Any) -> None:
    receipt = shown["receipt"]
    assert receipt.experts[1].tokens == tuple(len(seen.routed(expert)) for expert in range(8))
    assert receipt.components == {"thinker.attention": 16, "thinker.experts": 96}
    assert "talker.attention" in receipt.not_captured


@pytest.mark.parametrize("sequential", [False, True])
def test_replaced_weights(tiny_omni: Path, sequential: bool) -> None:
    """In sequential mode the layers behind read what the replaced ones make; otherwise nothing changes."""
    from omnifp4.calibration.hessians import visit_layers

    def run(replace: bool) -> list[Any]:
        hessians: list[Any] = []

        def visitor(name: str, inputs: Any) -> dict[str, Any] | None:
            hessians.append(inputs.hessian(f"{name}.self_attn.q_proj.weight"))
            if not replace or inputs.layer != 1:
                return None
            # All kinds of weights: plain, fused gate and up, fused down.
            chosen = [one for one in inputs.names if not one.endswith((".q_proj.weight", ".k_proj.weight"))]
            return {one: torch.zeros_like(inputs.weight(one)) for one in chosen}

        visit_layers(tiny_omni, "bundled", visitor, samples=4, sequential=sequential)
        return hessians

    before, after = run(False), run(True)
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert same == [True, True, not sequential, not sequential]


def test_layer_that_adds_nothing_passes_its_input_on(tiny_omni: Path) -> None:
    """With o and all down projections zero, a layer is the identity, but for the picture's features it may add."""
    from omnifp4.calibration.hessians import visit_layers

    seen: dict[int, Any] = {}

    def visitor(name: str, inputs: Any) -> dict[str, Any]:
        seen[inputs.layer] = inputs.samples(f"{name}.self_attn.q_proj.weight").float()
        return {
            one: torch.zeros_like(inputs.weight(one))
            for one in inputs.names
            if one.endswith((".o_proj.weight", ".down_proj.weight"))
        }

    visit_layers(tiny_omni, "bundled", visitor, samples=1, sequential=True)
    directions = [rows / rows.norm(dim=-1, keepdim=True) for rows in (seen[2], seen[3])]
    # Only the norms' weights differ from layer to layer.
    assert (directions[0] * directions[1]).sum(-1).min() > 0.97


def test_few_tokens_and_strides(tiny_omni: Path) -> None:
    from omnifp4.calibration.hessians import visit_layers

    counts: dict[str, tuple[int, str]] = {}

    def visitor(name: str, inputs: Any) -> None:
        if inputs.layer == 0:
            counts.update({one: (inputs.tokens(one), inputs.source(one)) for one in inputs.names})
            for one in inputs.names:
                if inputs.source(one) != "none":
                    assert inputs.hessian(one).isfinite().all()

    receipt = visit_layers(tiny_omni, "bundled", visitor, samples=4, most_tokens=100, least_tokens=40)
    whole = sum(receipt.tokens.values())
    kept = counts["thinker.model.layers.0.self_attn.q_proj.weight"][0]
    assert whole > 200
    assert 0.9 * whole / -(-whole // 100) <= kept <= 100
    assert {source for _, source in counts.values()} == {"routed", "all-expert"}
    assert all(tokens == kept for tokens, source in counts.values() if source == "all-expert")


def test_visitors_errors(tiny_omni: Path) -> None:
    from omnifp4.calibration.hessians import visit_layers

    with pytest.raises(OmniFP4Error, match=r"gave weight 'x', which is not of thinker.model.layers.0"):
        visit_layers(tiny_omni, "bundled", lambda *_: {"x": torch.zeros(1)}, samples=1, sequential=True)
    with pytest.raises(OmniFP4Error, match="sample_inputs is 0"):
        visit_layers(tiny_omni, "bundled", lambda *_: None, sample_inputs=0)
    name = "thinker.model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(OmniFP4Error, match=r"o_proj.weight' as \[1\]; it is \[128, \d+\]"):
        visit_layers(tiny_omni, "bundled", lambda *_: {name: torch.zeros(1)}, samples=1, sequential=True)
