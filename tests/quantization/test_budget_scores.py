"""What a budget chooses by: lost outputs, gradients, or the divergence in a sensitivity map."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import omnifp4
from omnifp4.errors import OmniFP4Error, RecipeError
from omnifp4.formats.scheme import Scheme
from omnifp4.quantization.recipe import find_recipe
from omnifp4.quantization.scores import Group, by_divergence
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.evaluation import Estimate
from omnifp4.receipt.sensitivity import SensitivityReceipt
from omnifp4.tiny import write_tiny_omni

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BITS = 5.0
AUTO: dict[str, Any] = {"recipe": "nvfp4-auto", "effective_bits": BITS, "threads": 1}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Two threads on matrices this small wait for each other for most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "set"
    omnifp4.dataset(out, samples=4)
    return out


@pytest.fixture(scope="module")
def statistics(tiny_omni: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With gradients."""
    out = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    omnifp4.calibrate(tiny_omni, out, data=data, speech=False, gradients=True, dtype="float32")
    return out


@pytest.fixture(scope="module")
def drawn(tiny_omni: Path, tiny_artifact: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("map")
    return omnifp4.sensitivity(
        tiny_artifact, against=tiny_omni, data=data / "conversations.jsonl", dtype="float32", cache=folder
    )


@pytest.fixture(scope="module")
def map_file(drawn: SensitivityReceipt, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("map") / "map.json"
    path.write_text(drawn.model_dump_json(), "utf-8")
    return path


@pytest.mark.parametrize("score", ["gradient", "kl"])
def test_quantize_verify_load_evaluate(
    score: str, tiny_omni: Path, statistics: Path, map_file: Path, data: Path, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"sensitivity": map_file} if score == "kl" else {"choose_by": score}
    out = tmp_path / "out"
    receipt = omnifp4.quantize(tiny_omni, out, statistics=statistics, **AUTO, **chosen)
    assert receipt.calibration is not None
    assert receipt.calibration.method["score"] == score
    assert bool(receipt.calibration.sensitivity_sha256) == (score == "kl")
    rows = [row for row in receipt.components if row.name in ("thinker.attention", "thinker.experts")]
    bits = 8 * sum(row.bytes_after for row in rows) / sum(row.parameters for row in rows)
    assert BITS - 0.5 < bits <= BITS
    plan = omnifp4.plan(tiny_omni, recipe="nvfp4-auto", effective_bits=BITS, statistics=statistics, **chosen)
    assert plan.weight_bytes_after == receipt.weight_bytes
    assert omnifp4.verify(out, against=tiny_omni).verdict is Verdict.PASS
    found = omnifp4.evaluate(
        out, against=tiny_omni, data=data / "conversations.jsonl", cache=tmp_path, floor=False, speech=False
    )
    assert all(one.model.non_finite == 0 and one.model.kl_mean.value < 1.5 for one in found.modalities)


def test_gradients_estimate_the_divergence_that_is_measured(
    tiny_omni: Path, statistics: Path, data: Path, tmp_path: Path
) -> None:
    """Of each layer of each component alone, in nats; the map of an FP8 artifact measured it by running the model.

    In NVFP4 random weights lose a third of a nat, for which no estimate of second order is meant.
    """
    from omnifp4.calibration.statistics import open_statistics
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.models.source import match_source
    from omnifp4.quantization.budget import _groups, _measure
    from omnifp4.quantization.method import Counted, Score
    from omnifp4.quantization.scores import _units

    components = ["thinker.attention=fp8", "thinker.experts=fp8"]
    omnifp4.quantize(tiny_omni, tmp_path / "fp8", components=components, threads=1)
    drawn = omnifp4.sensitivity(
        tmp_path / "fp8", against=tiny_omni, data=data / "conversations.jsonl", dtype="float32", cache=tmp_path
    )
    assert {row.scheme for row in drawn.rows} == {"fp8"}
    recipe, source = find_recipe("nvfp4-auto"), match_source(open_checkpoint(tiny_omni))
    groups = _groups(source, recipe, {}, Counted.STORED)
    with open_statistics(statistics) as known:
        schemes = (Scheme.NVFP4, Scheme.FP8, Scheme.WIDE)
        losses = _measure(source, groups, schemes, recipe.rule, Score.GRADIENT, known, 1, None)
    measured = {(row.component, row.layer): row.kl_mean for row in drawn.rows if row.expert is None}
    units = _units(groups, drawn)
    assert len(units) == 8
    for unit, members in units.items():
        estimate = sum(losses[group.name][Scheme.FP8] for group in members)
        kl = measured[unit]
        assert kl is not None
        assert 0 < estimate < 2 * kl.value
        if unit == ("thinker.experts", 3):
            # No router reads what comes of them, so that no choice of experts changes, which no gradient can foresee.
            assert 0.7 < estimate / kl.value < 1.5
    for group in groups:
        found = losses[group.name]
        assert found[Scheme.WIDE] == 0 < found[Scheme.FP8] < found[Scheme.NVFP4] / 4


def groups_and_losses(tiny_omni: Path) -> tuple[list[Group], dict[str, dict[Scheme, float]]]:
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.models.source import match_source
    from omnifp4.quantization.budget import _groups
    from omnifp4.quantization.method import Counted

    groups = _groups(match_source(open_checkpoint(tiny_omni)), find_recipe("nvfp4-auto"), {}, Counted.STORED)
    losses = {
        group.name: {Scheme.NVFP4: 0.02 if "qkv" in group.name else 0.01, Scheme.FP8: 0.001, Scheme.WIDE: 0.0}
        for group in groups
    }
    return groups, losses


def test_a_layers_divergence_is_shared_by_output_errors(tiny_omni: Path, drawn: SensitivityReceipt) -> None:
    groups, losses = groups_and_losses(tiny_omni)
    found = by_divergence(groups, losses, drawn)
    row = next(row for row in drawn.rows if (row.component, row.layer) == ("thinker.attention", 2))
    assert row.kl_mean is not None and drawn.noise_floor is not None
    cost = row.kl_mean.value - drawn.noise_floor
    qkv, out = (
        next(name for name in found if "layers.2.self_attn" in name and part in name) for part in ("qkv", "o_proj")
    )
    assert found[qkv][Scheme.NVFP4] == pytest.approx(2 / 3 * cost)
    assert found[out][Scheme.NVFP4] == pytest.approx(1 / 3 * cost)
    assert found[out][Scheme.FP8] == pytest.approx(cost / 30)
    assert found[qkv][Scheme.WIDE] == 0


def changed(drawn: SensitivityReceipt, **update: Any) -> SensitivityReceipt:
    rows = tuple(
        row.model_copy(update=update) if (row.component, row.layer) == ("thinker.experts", 1) else row
        for row in drawn.rows
    )
    return drawn.model_copy(update={"rows": rows})


@pytest.mark.parametrize(
    ("update", "told"),
    [
        ({"scheme": "fp8"}, r"has thinker\.experts, layer 1 in fp8, not nvfp4"),
        ({"scheme": ""}, "in a scheme that it does not tell, not nvfp4"),
        ({"kl_mean": None}, r"tells errors of thinker\.experts, layer 1 and no divergence .*without --segmented"),
        (
            {"kl_mean": Estimate(value=float("nan"), low=0.0, high=0.0)},
            r"no finite divergence of thinker\.experts, layer 1",
        ),
        ({"parameters": 5}, "has 5 parameters in .* of another model, or of other components"),
        ({"component": "thinker.mlp"}, r"has no row of thinker\.experts, layer 1"),
    ],
)
def test_a_map_that_does_not_fit(update: dict[str, Any], told: str, tiny_omni: Path, drawn: SensitivityReceipt) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        by_divergence(*groups_and_losses(tiny_omni), changed(drawn, **update))
    assert "\n" not in str(caught.value)


def test_a_map_of_other_weights_of_the_same_sizes(
    tiny_omni: Path, statistics: Path, drawn: SensitivityReceipt, tmp_path: Path
) -> None:
    """A finetune has the same rows with other figures."""
    tuned = write_tiny_omni(tmp_path / "tuned", seed=7)
    path = tmp_path / "map.json"
    path.write_text(drawn.model_dump_json(), "utf-8")
    with pytest.raises(RecipeError, match=r"sensitivity map of .* is of another model .*, not of .*tuned") as caught:
        omnifp4.plan(tuned, recipe="nvfp4-auto", effective_bits=BITS, sensitivity=path)
    assert "\n" not in str(caught.value)
    path.write_text(drawn.model_copy(update={"against_fingerprint": ""}).model_dump_json(), "utf-8")
    with pytest.raises(RecipeError, match=r"does not tell which weights it is of: an earlier omnifp4 drew it \(draw"):
        omnifp4.quantize(tiny_omni, tmp_path / "out", statistics=statistics, sensitivity=path, **AUTO)
    path.write_text(drawn.model_copy(update={"sensitivity_version": 9}).model_dump_json(), "utf-8")
    with pytest.raises(RecipeError, match=r"is of version 9, and this omnifp4 reads 1 \(draw it again"):
        omnifp4.plan(tiny_omni, recipe="nvfp4-auto", sensitivity=path)
    assert not (tmp_path / "out.partial").exists()


def test_a_map_of_noise_is_no_ground_to_choose_by(tiny_omni: Path, drawn: SensitivityReceipt) -> None:
    nothing = Estimate(value=1e-9, low=0.0, high=1e-8)
    rows = tuple(row.model_copy(update={"kl_mean": nothing}) for row in drawn.rows)
    noisy = drawn.model_copy(update={"rows": rows, "noise_floor": 1e-6})
    with pytest.raises(RecipeError, match="no part that costs more than its noise floor of 1e-06"):
        by_divergence(*groups_and_losses(tiny_omni), noisy)


def refused(told: str, *values: Any, **options: Any) -> None:
    with pytest.raises(OmniFP4Error, match=told) as caught:
        omnifp4.quantize(*values, **options)
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_has_no_use_is_said_first(
    tiny_omni: Path, data: Path, statistics: Path, map_file: Path, tmp_path: Path
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain.safetensors"
    omnifp4.calibrate(tiny_omni, plain, data=data, samples=1, speech=False)
    refused("--gradients collects them", tiny_omni, out, statistics=plain, choose_by="gradient", **AUTO)
    refused("needs a map of it .*add --sensitivity", tiny_omni, out, statistics=statistics, choose_by="kl", **AUTO)
    refused(
        "a sensitivity map has no use", tiny_omni, out, statistics=statistics, choose_by="gradient",
        sensitivity=map_file, **AUTO,
    )  # fmt: skip
    refused("has no budget", tiny_omni, out, recipe="nvfp4", sensitivity=map_file)
    refused("allowed are output, gradient, kl", tiny_omni, out, statistics=statistics, choose_by="luck", **AUTO)
    refused("cannot be read", tiny_omni, out, statistics=statistics, sensitivity=tmp_path / "gone.json", **AUTO)
    other = tmp_path / "plan.json"
    other.write_text(omnifp4.plan(tiny_omni).model_dump_json())
    refused("receipt is 'plan'; read are sensitivity", tiny_omni, out, statistics=statistics, sensitivity=other, **AUTO)
    assert {path.name for path in tmp_path.iterdir()} == {"plain.safetensors", "plan.json"}


def test_a_run_that_goes_on_must_choose_by_the_same_map(
    tiny_omni: Path, statistics: Path, map_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omnifp4.quantization.calibrated import CalibratedWorker

    def stopped(self: Any, unit: Any) -> Any:
        raise KeyboardInterrupt

    options = AUTO | {"statistics": statistics}
    with monkeypatch.context() as patch:
        patch.setattr(CalibratedWorker, "_encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            omnifp4.quantize(tiny_omni, tmp_path / "out", sensitivity=map_file, **options)
    value = json.loads(map_file.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(value | {"seconds": value["seconds"] + 1}))
    refused(
        "was begun as another job, with other .*sensitivity",
        tiny_omni,
        tmp_path / "out",
        sensitivity=other,
        resume=True,
        **options,
    )
    omnifp4.quantize(tiny_omni, tmp_path / "out", sensitivity=map_file, resume=True, **options)


def test_the_commands(
    tiny_omni: Path, statistics: Path, map_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from omnifp4.cli import main

    shared = ["--recipe", "nvfp4-auto", "--statistics", str(statistics), "--effective-bits", str(BITS), "--json"]
    sizes = {}
    for name, more in (("kl", ["--sensitivity", str(map_file)]), ("gradient", ["--choose-by", "gradient"])):
        monkeypatch.setattr(sys, "argv", ["omnifp4", "plan", str(tiny_omni), *shared, *more])
        with pytest.raises(SystemExit) as end:
            main.run()
        assert not end.value.code
        sizes[name] = json.loads(capsys.readouterr().out)["weight_bytes_after"]
    smallest = omnifp4.plan(tiny_omni).weight_bytes_after
    assert all(size > smallest for size in sizes.values())
