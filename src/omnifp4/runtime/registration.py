"""Registers with Transformers: from then on ``from_pretrained`` loads NVFP4 checkpoints packed.

``modelopt`` is new to Transformers and is registered. ``compressed-tensors`` and ``auto-round`` have quantizers of
Transformers; they keep everything but the NVFP4-packed checkpoints of model types that omnifp4 knows.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, Final

from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from omnifp4.runtime.claim import AUTO_ROUND, COMPRESSED_TENSORS, MODELOPT, NVFP4CheckpointConfig, announces_nvfp4

SHARED: Final = (COMPRESSED_TENSORS, AUTO_ROUND)
"""Methods of Transformers' own of which only some checkpoints are taken."""


class ModelOptQuantizer(HfQuantizer):
    """Makes an `NVFP4Quantizer`, whose module is imported only when a checkpoint needs it."""

    made_by_omnifp4 = True

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        return _make(quantization_config, **kwargs)


def _make(quantization_config: Any, **kwargs: Any) -> Any:
    from omnifp4.runtime.quantizer import NVFP4Quantizer

    return NVFP4Quantizer(quantization_config, **kwargs)


def register() -> None:
    """Register; doing it again changes nothing."""
    if MODELOPT not in auto.AUTO_QUANTIZER_MAPPING:
        register_quantization_config(MODELOPT)(NVFP4CheckpointConfig)
        register_quantizer(MODELOPT)(ModelOptQuantizer)
    _carry_claim()
    # A later Transformers may have a ModelOpt quantizer of its own; it keeps what is not NVFP4.
    for method in (MODELOPT, *SHARED):
        if method in auto.AUTO_QUANTIZER_MAPPING:
            _share(method)


def _carry_claim() -> None:
    """Let the class of a part (such as the thinker) load from a whole checkpoint that is quantized.

    Such a class reads its section of config.json, and the ``quantization_config`` beside that section is lost.
    """
    configs: Any = PreTrainedConfig
    original = configs.get_config_dict.__func__
    if getattr(original, "made_by_omnifp4", False):
        return

    @wraps(original)
    def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
        config, rest = original(cls, *args, **kwargs)
        claim, own_type = config.get("quantization_config"), getattr(cls, "model_type", "")
        if isinstance(claim, dict) and announces_nvfp4(claim) and own_type and config.get("model_type") != own_type:
            for key, section in config.items():
                if isinstance(section, dict) and (key == cls.base_config_key or section.get("model_type") == own_type):
                    section.setdefault("quantization_config", claim)
        return config, rest

    get_config_dict.made_by_omnifp4 = True  # type: ignore[attr-defined]
    configs.get_config_dict = classmethod(get_config_dict)


def _share(method: str) -> None:
    """Take NVFP4-packed checkpoints of a method that is registered already."""
    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    stock_config: Any = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
    stock_quantizer: Any = quantizers[method]
    if getattr(stock_quantizer, "made_by_omnifp4", False):
        return

    class SharedConfig(stock_config):  # type: ignore[misc]
        """Reads a config into the class of whoever loads the checkpoint."""

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            reader = NVFP4CheckpointConfig if announces_nvfp4(config_dict) else stock_config
            return reader.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    class SharedQuantizer(stock_quantizer):  # type: ignore[misc]
        """Makes the quantizer of whoever loads the checkpoint."""

        made_by_omnifp4 = True

        def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
            if isinstance(quantization_config, NVFP4CheckpointConfig):
                return _make(quantization_config, stock=(stock_config, stock_quantizer), **kwargs)
            return stock_quantizer(quantization_config, **kwargs)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = SharedConfig
    quantizers[method] = SharedQuantizer
