"""Gradients of a model that comes from disk layer by layer are those of the whole model."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omnifp4.checkpoint.folder import open_checkpoint  # noqa: E402
from omnifp4.errors import OmniFP4Error  # noqa: E402
from omnifp4.segments import gradients  # noqa: E402
from omnifp4.segments.gradients import run_gradients, signed  # noqa: E402
from omnifp4.segments.inputs import thinker_arguments  # noqa: E402
from omnifp4.tiny import write_random_checkpoint  # noqa: E402

LAST = 5
"""Positions of each sample that count."""


def positions_of(batches: list[Any]) -> list[Any]:
    lengths = [one.tensors["input_ids"].shape[1] for one in batches]
    return [torch.arange(length - LAST, length) for length in lengths]


def in_segments(folder: Path, batches: list[Any], **options: Any) -> tuple[dict[str, Any], list[int], int]:
    """Squares by parameter (copied), the order of layers, and the positions."""
    found: dict[str, Any] = {}
    order: list[int] = []

    def on_layer(number: int, modules: Any, squares: Any) -> None:
        order.append(number)
        for name, parameters in squares.items():
            for key, total in parameters.items():
                assert total.shape == modules[name].get_parameter(key).shape
                found[f"{name}.{key}"] = total.clone()

    count = run_gradients(
        open_checkpoint(folder), batches, positions_of(batches), on_layer, device=torch.device("cpu"),
        dtype=torch.float32, **options,
    )  # fmt: skip
    return found, order, count


def whole(folder: Path, batches: list[Any], names: list[str]) -> dict[str, Any]:
    """The same of the whole model, sample by sample, with the same signs; by the names that the run in segments gave."""
    import omnifp4
    from omnifp4.runtime.names import Renaming

    model = omnifp4.load(folder, speech=False, dtype=torch.float32, device="cpu", progress=False)
    thinker = model.thinker
    thinker.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, Any] = {}
    for batch, positions in zip(batches, positions_of(batches), strict=True):
        thinker.zero_grad()
        with torch.enable_grad():
            logits = thinker(**thinker_arguments(thinker, batch, torch.device("cpu"))).logits[0][positions]
            (logits * signed(logits.detach(), generator)).sum().backward()
        parameters = dict(model.named_parameters())
        renaming = Renaming(model)
        for name in names:
            on_disk = name.replace(".experts.gate_up_proj", ".experts.0.gate_proj.weight")
            on_disk = on_disk.replace(".experts.down_proj", ".experts.0.down_proj.weight")
            value = parameters[renaming.target(on_disk)]
            assert value.grad is not None
            sums[name] = sums.get(name, 0) + value.grad.square()
    return sums


def test_squares_are_those_of_the_whole_model(tiny_omni: Path, batches: list[Any]) -> None:
    """Text, a picture with features behind the first layers, a sound, and several of each."""
    found, order, count = in_segments(tiny_omni, batches)
    assert order == [3, 2, 1, 0]
    assert count == LAST * len(batches)
    expected = whole(tiny_omni, batches, list(found))
    assert len(found) == 4 * 6
    for name, total in found.items():
        same = expected[name]
        assert float(total.sum()) > 0
        # The order of sums differs, and what cancels out in them is known to fewer digits.
        torch.testing.assert_close(total, same, rtol=1e-3, atol=1e-6 * float(same.max()))


def test_samples_that_are_skipped_count_for_nothing(tiny_omni: Path, batches: list[Any]) -> None:
    alone, _, _ = in_segments(tiny_omni, batches[:1])
    found, _, count = in_segments(tiny_omni, batches, skip=[1, 2, 3])
    assert count == LAST
    assert all(torch.equal(found[name], total) for name, total in alone.items())
    with pytest.raises(OmniFP4Error, match="no samples"):
        in_segments(tiny_omni, batches[:1], skip=[0])


def test_states_that_lie_in_files_change_nothing(tiny_omni: Path, batches: list[Any]) -> None:
    kept, _, _ = in_segments(tiny_omni, batches[:2])
    spilled, _, _ = in_segments(tiny_omni, batches[:2], spill_bytes=1)
    assert all(torch.equal(spilled[name], total) for name, total in kept.items())


def test_signs_give_the_second_derivative_of_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all signs there are, the mean of u u' is diag(p) - p p' exactly."""
    logits = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    total = torch.zeros(4, 4)
    choices = list(itertools.product((0, 1), repeat=4))
    for bits in choices:
        monkeypatch.setattr(gradients.torch, "randint", lambda *_, bits=bits, **__: torch.tensor([bits]))
        u = signed(logits, torch.Generator())[0]
        total += torch.outer(u, u)
    p = logits[0].softmax(dim=0)
    torch.testing.assert_close(total / len(choices), torch.diag(p) - torch.outer(p, p), rtol=1e-5, atol=1e-7)


def test_a_gradient_without_numbers_is_named(
    tiny_omni: Path, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "signed", lambda logits, _: torch.full_like(logits, torch.inf))
    with pytest.raises(OmniFP4Error, match=r"gradient of sample 0 .* is not finite \(--dtype float32"):
        in_segments(tiny_omni, batches[:1])


def test_a_packed_checkpoint_has_none(tiny_artifact: Path, batches: list[Any]) -> None:
    with pytest.raises(OmniFP4Error, match="is quantized; gradients are of the wide checkpoint"):
        in_segments(tiny_artifact, batches[:1])


def test_the_weights_of_a_linear_with_a_bias_have_theirs(tmp_path: Path) -> None:
    """A bias stands before its weight in the file, and both are of one module."""
    import transformers

    sizes = {
        "vocab_size": 70, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "attention_bias": True, "mlp_bias": True,
    }  # fmt: skip
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | sizes
    folder = write_random_checkpoint(config, tmp_path / "llama")
    ids = torch.arange(12)[None]
    batch = SimpleNamespace(tensors={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, sound_in_video=False)
    found, _, _ = in_segments(folder, [batch])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(input_ids=ids).logits[0][positions_of([batch])[0]]
    (logits * signed(logits.detach(), torch.Generator().manual_seed(0))).sum().backward()
    assert len(found) == 7
    for name, total in found.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        torch.testing.assert_close(total, gradient.square(), rtol=1e-3, atol=1e-9)
