"""A choice of backend gives its reason; an explicit request never falls back."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from omnifp4.errors import OmniFP4Error
from omnifp4.formats import backend, choose_backend, decode, encode, reference
from omnifp4.formats.nvfp4 import ScaleRule


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None if name == module else importlib.util.find_spec(name))


def test_importing_the_package_imports_neither_torch_nor_numba() -> None:
    check = "import sys, omnifp4.formats; print(sorted({'torch', 'numba', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_auto_prefers_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, reason = choose_backend()
    assert chosen.name == "cpu" and "one core" in reason
    without(monkeypatch, "numba")
    chosen, reason = choose_backend("auto")
    assert chosen.name == "reference" and "numba is not installed" in reason


@pytest.mark.parametrize(("name", "module"), [("cpu", "numba"), ("cuda", "torch"), ("cuda", "triton")])
def test_an_explicit_request_names_what_is_missing(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if module == "triton":
        monkeypatch.setattr(backend, "find_spec", lambda name: None if name == "triton" else object())
    else:
        without(monkeypatch, module)
    with pytest.raises(OmniFP4Error, match=f"needs {module}"):
        choose_backend(name)


def test_no_such_backend() -> None:
    with pytest.raises(OmniFP4Error, match=r"'gpu' does not exist .*auto, reference, cpu, cuda"):
        choose_backend("gpu")


@pytest.mark.parametrize("rule", list(ScaleRule))
def test_backends_agree(source, rule: ScaleRule) -> None:
    plain, plain_stats = choose_backend("reference")[0].encode(source.raw, source.dtype, rule)
    fast, fast_stats = choose_backend("cpu")[0].encode(source.raw, source.dtype, rule)
    assert plain.tensor_scale == fast.tensor_scale
    assert (plain.block_scale != fast.block_scale).sum() <= 2
    assert fast_stats.squared_error == pytest.approx(
        plain_stats.squared_error, rel=1e-5, abs=1e-12 * plain_stats.energy
    )


def test_encode_and_decode_of_the_package() -> None:
    weight = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    for name in ("reference", "cpu"):
        encoded = encode(weight, backend=name)
        assert 6e-3 < reference.relative_squared_error(weight, decode(encoded)) < 7.2e-3
