"""The low-rank branch beside an NVFP4 linear (SVDQuant), under ModelOpt's names.

The linear computes ``Q x + up (down x)``. ModelOpt calls `up` ``svdquant_lora_b`` and `down` ``svdquant_lora_a``, and
the algorithm ``NVFP4_SVD``; with it goes the rank, as ``lora_rank``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from omnifp4.checkpoint.header import TensorEntry

BRANCH_UP_SUFFIX: Final = ".svdquant_lora_b"
"""BF16 ``[out, rank]``."""

BRANCH_DOWN_SUFFIX: Final = ".svdquant_lora_a"
"""BF16 ``[rank, in]``."""

BRANCH_SUFFIXES: Final = (BRANCH_UP_SUFFIX, BRANCH_DOWN_SUFFIX)

BRANCH_ALGORITHM: Final = "NVFP4_SVD"


class BranchEntries(NamedTuple):
    """The branch of one linear as it stands on disk."""

    up: TensorEntry
    down: TensorEntry


def find_branches(tensors: Mapping[str, TensorEntry]) -> dict[str, BranchEntries]:
    """The branches among a checkpoint's tensors, by module; one half alone is none."""
    found = {}
    for name, up in tensors.items():
        if name.endswith(BRANCH_UP_SUFFIX):
            module = name.removesuffix(BRANCH_UP_SUFFIX)
            if down := tensors.get(module + BRANCH_DOWN_SUFFIX):
                found[module] = BranchEntries(up, down)
    return found


def with_branch(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """A ModelOpt ``quantization_config`` that announces branches of `rank`, without smoothing of the inputs."""
    groups = {
        name: {**group, "has_zero_point": False, "pre_quant_scale": False, "lora_rank": rank}
        for name, group in config["config_groups"].items()
    }
    return {**config, "quant_algo": BRANCH_ALGORITHM, "config_groups": groups}
