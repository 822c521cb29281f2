"""The tiny omni model, its processor, and conversations on them, once per session."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def transformers() -> Any:
    pytest.importorskip("torch", reason="torch is not installed")
    from omnifp4.runtime.torchvision_on_cpu import declare_missing_operators

    declare_missing_operators()
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="session")
def load_tiny(transformers: Any, tiny_omni: Path) -> Callable[[], Any]:
    """Loads a model of one's own, as Transformers alone does: for tests that change or break it."""
    import torch

    def load() -> Any:
        model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(
            tiny_omni, dtype=torch.bfloat16, local_files_only=True
        )
        return model.eval()

    return load


@pytest.fixture(scope="session")
def model(load_tiny: Callable[[], Any]) -> Any:
    """Never ends its speech by itself, so that tests decide how long it is."""
    loaded = load_tiny()
    end = loaded.config.talker_config.codec_eos_token_id

    def go_on(_: Any, __: Any, logits: Any) -> Any:
        logits[..., end] = -1e4
        return logits

    loaded.talker.codec_head.register_forward_hook(go_on)
    return loaded


@pytest.fixture(scope="session")
def processor(transformers: Any, tiny_omni: Path) -> Any:
    for needed in ("torchvision", "PIL"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"the processor needs {needed}, which is not installed")
    return transformers.Qwen3OmniMoeProcessor.from_pretrained(tiny_omni, local_files_only=True)


@pytest.fixture
def new_chat(model: Any, processor: Any) -> Callable[..., Any]:
    """Opens conversations on the shared model: short, greedy answers that never end by themselves, unless told so."""
    from omnifp4.chat import OmniChat
    from omnifp4.chat.loading import open_model
    from omnifp4.decoding.module_engine import ModuleEngine, ThinkerDecoder

    class Talkative(ThinkerDecoder):
        def prefill(self, inputs: Any) -> Any:
            return self.go_on(super().prefill(inputs))

        def step(self, token: int) -> Any:
            return self.go_on(super().step(token))

        def go_on(self, logits: Any) -> Any:
            logits[:, model.config.im_end_token_id] = -1e4
            return logits

    def open_chat(**arguments: Any) -> Any:
        own, own_processor = arguments.pop("model", model), arguments.pop("processor", processor)
        if isinstance(own, Path):
            own, own_processor = open_model(own, own_processor, device="cpu", speech=arguments.get("speech", True))
        engine = ModuleEngine(own, decoder=arguments.pop("decoder", Talkative))
        defaults = {"processor": own_processor, "max_new_tokens": 8, "temperature": 0, "max_speech_seconds": 1.0}
        return OmniChat(own, **{"engine": engine, **defaults, **arguments})

    return open_chat
