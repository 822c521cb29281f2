"""Recipes that look at inputs: each through quantize, verify, load and evaluate; and what they promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omnifp4
from omnifp4.checkpoint.folds import FOLDS_NAME, read_folds, scaled
from omnifp4.errors import OmniFP4Error, RecipeError
from omnifp4.formats.widening import narrow, widen
from omnifp4.quantization.recipe import RECIPES, find_recipe
from omnifp4.receipt.base import Verdict
from small_checkpoints import Tensors, folder_bytes, read_tensors, write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

FROM_FILE = ("nvfp4-w4a4", "nvfp4-importance", "nvfp4-local-hessian", "nvfp4-auto")
FROM_DATA = ("nvfp4-gptq", "nvfp4-awq-lite", "nvfp4-awq-full", "nvfp4-svdquant", "nvfp4-signround")
EXPERT = "thinker.model.layers.0.mlp.experts"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Two threads on matrices this small wait for each other for most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration set with one conversation of each modality."""
    out = tmp_path_factory.mktemp("data") / "set"
    receipt = omnifp4.dataset(out, samples=4)
    assert {"text", "image", "audio"} <= {one.modality for one in receipt.modalities}
    return out


@pytest.fixture(scope="module")
def statistics(tiny_omni: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    omnifp4.calibrate(tiny_omni, out, data=data, speech=False)
    return out


@pytest.fixture(scope="module")
def quick_signround(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe with fewer steps."""
    recipe = json.loads(RECIPES["nvfp4-signround"].model_dump_json())
    path = tmp_path_factory.mktemp("recipes") / "quick.json"
    path.write_text(json.dumps(recipe | {"name": "quick", "method": {"name": "signround", "steps": 4}}))
    return path


@pytest.fixture(scope="module")
def made(
    tiny_omni: Path, data: Path, statistics: Path, quick_signround: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Makes the artifact of a recipe, once."""
    home, done = tmp_path_factory.mktemp("made"), dict[str, tuple[Path, Any]]()

    def make(name: str) -> tuple[Path, Any]:
        if name not in done:
            recipe = str(quick_signround) if name == "nvfp4-signround" else name
            seen: dict[str, Any] = {"statistics": statistics} if name in FROM_FILE else {"data": data, "device": "cpu"}
            done[name] = home / name, omnifp4.quantize(tiny_omni, home / name, recipe=recipe, threads=1, **seen)
        return done[name]

    return make


@pytest.mark.parametrize("recipe", [*FROM_FILE, *FROM_DATA])
def test_quantize_verify_load_evaluate(recipe: str, made: Any, tiny_omni: Path, data: Path, tmp_path: Path) -> None:
    artifact, receipt = made(recipe)
    assert receipt.calibration.samples == 4
    proof = omnifp4.verify(artifact, against=tiny_omni)
    assert [item for item in proof.checks if item.verdict is Verdict.FAIL] == []
    assert proof.activations == ("W4A4" if recipe == "nvfp4-w4a4" else "W4A16")
    found = omnifp4.evaluate(
        artifact, against=tiny_omni, data=data / "conversations.jsonl", cache=tmp_path, floor=False, speech=False
    )
    assert {one.modality for one in found.modalities} >= {"text", "image", "audio"}
    # The sweep without data gives 0.4 to 0.7 nats on these random weights.
    assert all(one.model.kl_mean.value < 1.5 and one.model.non_finite == 0 for one in found.modalities)


@pytest.mark.parametrize("recipe", FROM_DATA)
def test_outputs_err_less_than_by_the_data_free_rule(recipe: str, made: Any) -> None:
    _, receipt = made(recipe)
    outputs = receipt.calibration.outputs
    assert set(outputs) == {"thinker.attention", "thinker.experts"}
    # The channels of random weights are all alike, which leaves AWQ nothing to find.
    most = {"nvfp4-awq-lite": 1.0, "nvfp4-awq-full": 1.0, "nvfp4-signround": 0.99}.get(recipe, 0.75)
    for found in outputs.values():
        assert 0 < found.error < most * found.data_free


@pytest.mark.parametrize("recipe", ["nvfp4-w4a4", "nvfp4-svdquant", "nvfp4-auto"])
def test_the_plan_is_exact(recipe: str, made: Any, tiny_omni: Path, statistics: Path) -> None:
    artifact, receipt = made(recipe)
    known = statistics if recipe == "nvfp4-auto" else None
    plan = omnifp4.plan(tiny_omni, recipe=recipe, statistics=known)
    assert plan.weight_bytes_after == receipt.weight_bytes
    assert plan.weight_bytes_after == sum(path.stat().st_size for path in artifact.glob("*.safetensors"))


def test_w4a4_has_an_input_scale_for_every_linear_and_expert(made: Any, statistics: Path) -> None:
    from omnifp4.calibration.statistics import open_statistics

    artifact, receipt = made("nvfp4-w4a4")
    tensors = read_tensors(artifact)
    with open_statistics(statistics) as known:
        for name in receipt.decisions:
            scale = float(tensors[name.removesuffix(".weight") + ".input_scale"].bits.reshape(-1)[0])
            if known.source(name) != "none":
                assert scale == pytest.approx(float(known.of(name).amax) / (6 * 448), rel=1e-6)
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "NVFP4"


def test_an_expert_that_saw_nothing_takes_the_largest_input_scale_of_its_siblings(
    tiny_omni: Path, data: Path, tmp_path: Path
) -> None:
    from omnifp4.calibration.statistics import open_statistics

    sparse = tmp_path / "sparse.safetensors"
    with open_statistics(omnifp4_statistics(tiny_omni, data, sparse, 1)) as known:
        routed = [known.tokens(f"{EXPERT}.{number}.gate_proj.weight") for number in range(8)]
    least = sorted(routed)[4]
    sparse.unlink()
    with open_statistics(omnifp4_statistics(tiny_omni, data, sparse, least)) as known:
        names = [f"{EXPERT}.{number}.gate_proj.weight" for number in range(8)]
        assert "routed" in {known.source(name) for name in names}
        largest = max(float(known.of(name).amax) for name in names if known.source(name) != "none")
        unknown = [name for name in names if known.source(name) == "none"]
    receipt = omnifp4.quantize(
        tiny_omni, tmp_path / "out", recipe="nvfp4-w4a4", statistics=sparse, format="compressed-tensors", threads=1
    )
    tensors = read_tensors(tmp_path / "out")
    for name in unknown:
        stored = tensors[name.removesuffix(".weight") + ".input_global_scale"].bits.reshape(-1)[0]
        assert 1 / stored == pytest.approx(largest / (6 * 448), rel=1e-6)
    assert receipt.calibration.sources.get("none", 0) == receipt.calibration.sibling_scales
    assert bool(unknown) == bool(receipt.calibration.sibling_scales)


def omnifp4_statistics(model: Path, data: Path, out: Path, least_tokens: int) -> Path:
    omnifp4.calibrate(model, out, data=data, speech=False, least_tokens=least_tokens)
    return out


@pytest.mark.parametrize("recipe", ["nvfp4-awq-lite", "nvfp4-awq-full"])
def test_a_fold_keeps_what_the_model_computes_to_the_bit(
    recipe: str, made: Any, tiny_omni: Path, tmp_path: Path
) -> None:
    """The source with the folds of the artifact, unrounded, gives the logits of the source: router and experts too."""
    artifact, receipt = made(recipe)
    folds = read_folds(artifact)
    assert len(folds) == receipt.calibration.folds > 0
    tensors = read_tensors(tiny_omni)
    for name in folds.names:
        tensors[name] = folded(tensors, name, folds)
    config = json.loads((tiny_omni / "config.json").read_text())
    moved = write_checkpoint(tmp_path / "moved", config, tensors)
    for path in tiny_omni.iterdir():
        if path.suffix != ".safetensors" and not (moved / path.name).exists():
            (moved / path.name).write_bytes(path.read_bytes())
    assert torch.equal(logits(moved), logits(tiny_omni))
    # What stays wide in the artifact is what was folded.
    written = read_tensors(artifact)
    wide = [name for name in folds.names if name in written and written[name].dtype == "BF16"]
    assert any(name.endswith("layernorm.weight") for name in wide)
    assert all(written[name].same_as(tensors[name]) for name in wide)


def folded(tensors: Tensors, name: str, folds: Any) -> Any:
    tensor = tensors[name]
    values = scaled(widen(tensor.bits, tensor.dtype), folds.exponents(name, tensor.bits.shape))
    bits = np.asarray(narrow(values, tensor.dtype))
    assert np.array_equal(widen(bits, tensor.dtype), values), "no bit is lost"
    return type(tensor)(tensor.dtype, bits)


def logits(folder: Path) -> Any:
    model = omnifp4.load(folder, speech=False, device="cpu")
    ids = torch.arange(300, 340).view(1, -1)
    with torch.no_grad():
        return model.thinker(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_a_router_that_misses_its_fold_is_found(made: Any, tiny_omni: Path, tmp_path: Path) -> None:
    artifact, _ = made("nvfp4-awq-lite")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in artifact.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    value = json.loads((artifact / FOLDS_NAME).read_text())
    fold = next(one for one in value["folds"] if "mlp.gate.weight" in "".join(one["readers"]))
    fold["readers"] = [name for name in fold["readers"] if not name.endswith("mlp.gate.weight")]
    (broken / FOLDS_NAME).write_text(json.dumps(value))
    failed = {item.name for item in omnifp4.verify(broken, against=tiny_omni).checks if item.verdict is Verdict.FAIL}
    assert failed == {"folds", "values.untouched"}


def test_svdquant_computes_the_branch_beside_the_codes(made: Any) -> None:
    """The packed model with its branches gives what the same weights, put together, give."""
    artifact, _ = made("nvfp4-svdquant")
    model = omnifp4.load(artifact, speech=False, device="cpu")
    layer = model.thinker.get_decoder().layers[0]
    query = layer.self_attn.q_proj
    x = torch.randn(7, query.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(query(x), x @ query.weight.float().T, rtol=0.02, atol=0.02)
    experts = layer.mlp.experts
    assert query.has_branch and experts.has_branch
    unpack = experts.backend.whole
    gate, up = (x @ unpack(experts.gate_up(3), torch.float32).T).chunk(2, dim=-1)
    wanted = (experts.activate(gate) * up) @ unpack(experts.down(3), torch.float32).T
    index, weights = torch.full((7, 1), 3), torch.ones(7, 1)
    torch.testing.assert_close(experts(x, index, weights), wanted, rtol=1e-3, atol=1e-4)
    saved = artifact.parent / "saved-svdquant"
    model.save_pretrained(saved)
    before, after = read_tensors(artifact), read_tensors(saved)
    branches = [name for name in before if name.endswith((".svdquant_lora_a", ".svdquant_lora_b"))]
    thinker = [name for name in branches if name.startswith("thinker.")]
    assert thinker
    assert all(after[name].same_as(before[name]) for name in thinker)


def test_auto_keeps_its_budget_and_what_kernels_fuse_together(made: Any) -> None:
    _, receipt = made("nvfp4-auto")
    schemes = {name: receipt.schemes.get(name, "nvfp4") for name in receipt.decisions} | dict.fromkeys(
        receipt.left_out, "bf16"
    )
    layer = "thinker.model.layers.1."
    assert len({schemes[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"}) == 1
    experts = {scheme for name, scheme in schemes.items() if name.startswith(f"{layer}mlp.experts.")}
    assert len(experts) == 1
    rows = [row for row in receipt.components if row.name in ("thinker.attention", "thinker.experts")]
    bits = 8 * sum(row.bytes_after for row in rows) / sum(row.parameters for row in rows)
    assert 4.6 < bits <= 4.8
    assert set(schemes.values()) > {"nvfp4"}


@pytest.mark.parametrize("counted", ["stored", "read"])
def test_a_budget_counts_what_is_stored_or_read(counted: str, tiny_omni: Path, statistics: Path) -> None:
    """Of eight experts a token reads two, so a budget that counts reading has a quarter of their bits."""
    plan = omnifp4.plan(tiny_omni, recipe="nvfp4-auto", effective_bits=6, counted=counted, statistics=statistics)
    share = {"thinker.attention": 1.0, "thinker.experts": 0.25 if counted == "read" else 1.0}
    rows = [row for row in plan.components if row.name in share]
    bits = 8 * sum(row.bytes_after * share[row.name] for row in rows)
    assert 5.5 < bits / sum(row.parameters * share[row.name] for row in rows) <= 6


@pytest.mark.parametrize("recipe", ["nvfp4-gptq", "nvfp4-awq-lite"])
@pytest.mark.parametrize("after", [17])
def test_an_interrupted_run_ends_with_the_same_bytes(
    recipe: str, after: int, made: Any, tiny_omni: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omnifp4.quantization.calibrated import CalibratedWorker

    whole, _ = made(recipe)
    encode, count = CalibratedWorker._encode, 0

    def stopped(self: Any, unit: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return encode(self, unit)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(CalibratedWorker, "_encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            omnifp4.quantize(tiny_omni, out, recipe=recipe, data=data, device="cpu", threads=1)
    assert not out.exists()
    receipt = omnifp4.quantize(tiny_omni, out, recipe=recipe, data=data, device="cpu", threads=1, resume=True)
    assert receipt.resumed_units >= after
    ours, theirs = folder_bytes(out), folder_bytes(whole)
    assert {name for name in ours if ours[name] != theirs[name]} <= {"omnifp4.json", "README.md"}
    assert ours.keys() == theirs.keys()


def refused(words: str, *values: Any, **options: Any) -> None:
    with pytest.raises(OmniFP4Error, match=words) as caught:
        omnifp4.quantize(*values, **options)
    assert "\n" not in str(caught.value)


def test_what_a_recipe_lacks_is_said_before_anything_is_made(tiny_omni: Path, statistics: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("add --data", tiny_omni, out, recipe="nvfp4-gptq", statistics=statistics)
    refused("--statistics", tiny_omni, out, recipe="nvfp4-w4a4")
    refused("--statistics", tiny_omni, out, recipe="nvfp4", rule="importance")
    refused("have no use", tiny_omni, out, recipe="nvfp4", statistics=statistics)
    with pytest.raises(RecipeError, match="have no use"):
        omnifp4.plan(tiny_omni, statistics=statistics)
    refused("before anything is written", tiny_omni, out, recipe="nvfp4-auto", data="bundled")
    refused("has no budget", tiny_omni, out, recipe="nvfp4", effective_bits=5)
    refused("--format modelopt", tiny_omni, out, recipe="nvfp4-svdquant", data="bundled", format="compressed-tensors")
    refused(
        "talker.*input scale", tiny_omni, out, recipe="nvfp4-w4a4", statistics=statistics,
        components=["talker.attention=nvfp4"],
    )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [4.4, 0.0, 17.0])
def test_an_impossible_budget(bits: float, tiny_omni: Path, statistics: Path, tmp_path: Path) -> None:
    refused("bits", tiny_omni, tmp_path / "out", recipe="nvfp4-auto", effective_bits=bits, statistics=statistics)
    with pytest.raises(RecipeError, match="bits"):
        omnifp4.plan(tiny_omni, recipe="nvfp4-auto", effective_bits=bits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": 1}, "key 'extra' is unknown; known are name, version"),
        ({"method": {"name": "gptq", "dampin": 1}}, "'method.gptq.dampin' is unknown; known are name, damping"),
        ({"method": {"name": "gptq", "damping": 7}}, "damping' is 7"),
        ({"method": {"name": "magic"}}, "method"),
        ({"components": {"thinker.expert": "nvfp4"}}, "no model has a component 'thinker.expert'"),
        ({"components": {"thinker.experts": "nvfp3"}}, "nvfp3"),
        ({"rule": "sweeep"}, "rule"),
        ({"version": 0}, "version"),
        ({"name": "nvfp4"}, "bundled recipe"),
        ({"name": "two\nlines"}, "characters that cannot be shown"),
        ({"title": "\x1b[31m"}, "characters that cannot be shown"),
        ({"method": {"name": "gptq", "damping": 1e-9}}, "damping' is 1e-09: input should be greater"),
        ({"method": {"name": "auto", "schemes": []}}, "schemes' is .*at least 1 item"),
        (
            {"rule": "max", "weighting": "importance"},
            "rule 'max' weighs no errors, so weighting 'importance' has no use",
        ),
        ({"rule": "four-over-six", "weighting": "local-hessian", "method": {"name": "gptq"}}, "has no use: take rule"),
    ],
)
def test_a_recipe_file_that_is_not_right(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    recipe = {"name": "mine", "version": 1, "components": {"thinker.experts": "nvfp4"}} | change
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=words) as caught:
        find_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "version": 1, "components": {"thinker.mlp": "nvfp4", "thinker.mlp": "fp8"}}')
    with pytest.raises(RecipeError, match=r"key 'thinker\.mlp' stands twice"):
        find_recipe(str(path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"components": {"thinker.experts": "fp8"}, "method": {"name": "gptq"}},
            "does gptq to linears of the thinker in",
        ),
        (
            {"components": {"talker.experts": "nvfp4"}, "method": {"name": "svdquant"}},
            "does svdquant to linears of the",
        ),
        ({"components": {"thinker.experts": "fp8"}, "weighting": "importance"}, "does importance to linears in nvfp4"),
        ({"components": {"thinker.experts": "fp8"}, "activations": "W4A4"}, "does W4A4 to linears in nvfp4, and with"),
    ],
)
def test_a_method_that_nothing_is_rounded_by(
    change: dict[str, Any], told: str, tiny_omni: Path, tmp_path: Path
) -> None:
    """Otherwise the receipt would name a method that did nothing, after a run over all data."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "version": 1} | change))
    with pytest.raises(RecipeError, match=told):
        omnifp4.plan(tiny_omni, recipe=str(path))
    refused(told, tiny_omni, tmp_path / "out", recipe=str(path), data="bundled")


def test_a_budget_leaves_what_the_recipe_settles(tiny_omni: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    settled = {"thinker.experts": "nvfp4", "thinker.attention": "fp8"}
    method = {"name": "auto", "effective_bits": 16, "schemes": ["nvfp4", "bf16"]}
    path.write_text(json.dumps({"name": "mine", "version": 1, "components": settled, "method": method}))
    rows = {row.name: row for row in omnifp4.plan(tiny_omni, recipe=str(path)).components}
    attention, experts = rows["thinker.attention"], rows["thinker.experts"]
    assert attention.quantized_parameters > 0 == experts.quantized_parameters


def test_a_recipe_file_of_ones_own(tiny_omni: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "version": 2, "components": {"thinker.experts": "fp8"}}))
    receipt = omnifp4.quantize(tiny_omni, tmp_path / "out", recipe=str(path), format="compressed-tensors")
    assert (receipt.recipe, receipt.recipe_version) == ("mine", 2)
    assert set(receipt.schemes.values()) == {"fp8"}


def test_what_convert_and_repair_cannot_carry_is_refused(made: Any, tiny_omni: Path, tmp_path: Path) -> None:
    branches, folded_channels = made("nvfp4-svdquant")[0], made("nvfp4-awq-lite")[0]
    with pytest.raises(OmniFP4Error, match="low-rank branch"):
        omnifp4.convert(branches, tmp_path / "out", format="compressed-tensors")
    with pytest.raises(OmniFP4Error, match="low-rank branch"):
        omnifp4.repair(branches, tmp_path / "out")
    with pytest.raises(OmniFP4Error, match="channels were scaled"):
        omnifp4.repair(folded_channels, tmp_path / "out", source=tiny_omni)
    assert not list(tmp_path.iterdir())
    omnifp4.convert(folded_channels, tmp_path / "converted", format="compressed-tensors")
    proof = omnifp4.verify(tmp_path / "converted", against=tiny_omni)
    assert proof.verdict is Verdict.PASS
    assert "folds" in {item.name for item in proof.checks}


@pytest.mark.parametrize(
    ("component", "format", "told"),
    [
        (
            "thinker.attention=fp8",
            "modelopt",
            r"beside thinker\.attention in fp8 \(--component thinker\.attention=bf16",
        ),
        ("talker=mxfp4", "modelopt", r"beside talker\.[a-z]+ in mxfp4"),
        ("talker.experts=fp8", "compressed-tensors", "cannot hold the low-rank branch"),
    ],
)
def test_branches_beside_other_schemes_are_refused_before_any_work(
    component: str, format: str, told: str, tiny_omni: Path, data: Path, tmp_path: Path
) -> None:
    """Engines take a layer of an algorithm that they do not know for a wide one."""
    options: dict[str, Any] = {"recipe": "nvfp4-svdquant", "components": [component], "format": format}
    with pytest.raises(RecipeError, match=told):
        omnifp4.plan(tiny_omni, **options)
    with pytest.raises(RecipeError, match=told):
        omnifp4.quantize(tiny_omni, tmp_path / "out", data=data, **options)
    assert not list(tmp_path.iterdir())
    assert omnifp4.plan(tiny_omni, **(options | {"format": "fake-quant"})).weight_bytes_after


@pytest.mark.parametrize("options", [{"recipe": "nvfp4-awq-lite"}, {"recipe": "nvfp4-mlp", "rule": "importance"}])
def test_a_file_is_enough_where_blocks_of_the_hessian_are(
    options: dict[str, str], tiny_omni: Path, statistics: Path, tmp_path: Path
) -> None:
    receipt = omnifp4.quantize(tiny_omni, tmp_path / "out", statistics=statistics, threads=1, **options)
    outputs = receipt.calibration.outputs["thinker.experts"]
    assert outputs.error < outputs.data_free
    assert receipt.rule == "importance"
    assert omnifp4.verify(tmp_path / "out", against=tiny_omni).verdict is Verdict.PASS
