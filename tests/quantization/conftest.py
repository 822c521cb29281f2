"""Small checkpoints of every model type, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_checkpoints import QWEN3_MOE, QWEN3_VL_MOE, SMALL_CONFIGS, Tensors, fused, random_tensors, write_checkpoint


@pytest.fixture(scope="session")
def small_tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    """Random BF16 tensors by model type."""
    home = tmp_path_factory.mktemp("random")
    return {name: random_tensors(home / name, config) for name, config in SMALL_CONFIGS.items()}


@pytest.fixture(scope="session")
def small_folders(
    tmp_path_factory: pytest.TempPathFactory, small_tensors: dict[str, Tensors], tiny_omni: Path
) -> dict[str, Path]:
    """Checkpoint folders by name: every model type, fused experts in both orientations, and the tiny omni."""
    home = tmp_path_factory.mktemp("small")
    folders = {"tiny_omni": tiny_omni}
    for name, config in SMALL_CONFIGS.items():
        folders[name] = write_checkpoint(home / name, config, small_tensors[name])
    for name, config in (("qwen3_moe", QWEN3_MOE), ("qwen3_vl_moe", QWEN3_VL_MOE)):
        whole = fused(config, small_tensors[name], transposed=False)
        folders[f"{name}_fused"] = write_checkpoint(home / f"{name}_fused", config, whole, shards=2)
    whole = fused(QWEN3_VL_MOE, small_tensors["qwen3_vl_moe"], transposed=True)
    folders["qwen3_vl_moe_transposed"] = write_checkpoint(home / "qwen3_vl_moe_transposed", QWEN3_VL_MOE, whole)
    return folders
