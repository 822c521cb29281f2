"""Samples of every modality, as the model reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def batches(tiny_omni: Path) -> list[Any]:
    """Text, a picture, a sound, and two of each."""
    import numpy as np

    pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    from omnifp4.chat.inputs import build_inputs
    from omnifp4.chat.loading import open_processor
    from omnifp4.chat.media import MediaRules, load_media
    from omnifp4.chat.messages import user_message
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.segments.skeleton import Skeleton

    random = np.random.default_rng(0)
    picture = (random.random((64, 64, 3)) * 255).astype(np.uint8)
    sound = (random.standard_normal(12_000) * 0.1).astype(np.float32)
    messages = [
        user_message("Hello there"),
        user_message("What is it?", images=[picture]),
        user_message("Who speaks?", audios=[sound]),
        user_message("Both", images=[picture, picture[:32]], audios=[sound, sound[:6000]]),
    ]
    model = Skeleton(open_checkpoint(tiny_omni), dtype=torch.bfloat16, device=torch.device("cpu")).model
    processor = open_processor(str(tiny_omni))
    read = [load_media([message], MediaRules())[0] for message in messages]
    return [build_inputs(model, processor, one, device="cpu") for one in read]
