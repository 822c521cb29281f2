"""A small mixture-of-experts checkpoint and the tiny omni, quantized once a session in both dialects."""

from __future__ import annotations

from pathlib import Path

import pytest
from damaging import Damaged

from omnifp4 import quantize
from small_checkpoints import QWEN3_MOE, random_tensors, write_checkpoint

DIALECTS = ("modelopt", "compressed-tensors")


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide qwen3_moe checkpoint of two layers and four experts."""
    home = tmp_path_factory.mktemp("moe")
    return write_checkpoint(home / "original", QWEN3_MOE, random_tensors(home, QWEN3_MOE))


@pytest.fixture(scope="session")
def moe_artifacts(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`moe` quantized, by dialect; and with max scaling, whose tensor scales are no powers of two, as NAME-max."""
    home = tmp_path_factory.mktemp("moe_artifacts")
    for dialect in DIALECTS:
        quantize(moe, home / dialect, format=dialect, threads=1)
        quantize(moe, home / f"{dialect}-max", format=dialect, rule="max", threads=1)
    return {path.name: path for path in home.iterdir()}


@pytest.fixture(scope="session")
def omni_artifacts(tiny_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny omni quantized, by dialect, in several shards."""
    home = tmp_path_factory.mktemp("omni_artifacts")
    for dialect in DIALECTS:
        quantize(tiny_omni, home / dialect, format=dialect, threads=1, max_shard_bytes=2_000_000)
    return {path.name: path for path in home.iterdir()}


@pytest.fixture(params=DIALECTS)
def damaged(request: pytest.FixtureRequest, moe_artifacts: dict[str, Path]) -> Damaged:
    """The small artifact without its receipt, in each dialect, to be damaged."""
    return Damaged(moe_artifacts[request.param])
