"""The bundled, trained tiny omni model, and random checkpoints of real shape: what demo, tests and measurements run on."""

from omnifp4.tiny.checkpoint import (
    RELEASED_CONFIGS,
    released_config,
    tiny_config,
    write_random_checkpoint,
    write_tiny_omni,
)
from omnifp4.tiny.trained import trained_config

__all__ = [
    "RELEASED_CONFIGS",
    "released_config",
    "tiny_config",
    "trained_config",
    "write_random_checkpoint",
    "write_tiny_omni",
]
