"""Registers with Transformers: from then on ``from_pretrained`` loads NVFP4 checkpoints packed.

``modelopt`` is new to Transformers and is registered. ``compressed-tensors`` and ``auto-round`` have quantizers of
Transformers; they keep everything but the NVFP4-packed checkpoints of model types that omnifp4 knows.
"""

from __future__ import annotations

from typing import Any, Final

from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from omnifp4.runtime.claim import AUTO_ROUND, COMPRESSED_TENSORS, MODELOPT, NVFP4CheckpointConfig, announces_nvfp4
from omnifp4.runtime.quantizer import NVFP4Quantizer

SHARED: Final = (COMPRESSED_TENSORS, AUTO_ROUND)
"""Methods of Transformers' own of which only some checkpoints are taken."""


def register() -> None:
    """Register; doing it again changes nothing."""
    if auto.AUTO_QUANTIZER_MAPPING.get(MODELOPT) is NVFP4Quantizer:
        return
    if MODELOPT not in auto.AUTO_QUANTIZER_MAPPING:
        register_quantization_config(MODELOPT)(NVFP4CheckpointConfig)
        register_quantizer(MODELOPT)(NVFP4Quantizer)
    else:
        # A later Transformers has a quantizer of its own; it keeps what is not NVFP4.
        _share(MODELOPT)
    for method in SHARED:
        if method in auto.AUTO_QUANTIZER_MAPPING:
            _share(method)


def _share(method: str) -> None:
    """Take NVFP4-packed checkpoints of a method that is registered already."""
    stock_config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
    stock_quantizer = auto.AUTO_QUANTIZER_MAPPING[method]
    if getattr(stock_quantizer, "shared_with_omnifp4", False):
        return

    class SharedConfig(stock_config):  # type: ignore[misc, valid-type]
        """Reads a config into the class of whoever loads the checkpoint."""

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            reader = NVFP4CheckpointConfig if announces_nvfp4(config_dict) else stock_config
            return reader.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    class SharedQuantizer(stock_quantizer):  # type: ignore[misc, valid-type]
        """Makes the quantizer of whoever loads the checkpoint."""

        shared_with_omnifp4 = True

        def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
            if isinstance(quantization_config, NVFP4CheckpointConfig):
                return NVFP4Quantizer(quantization_config, stock=(stock_config, stock_quantizer), **kwargs)
            return stock_quantizer(quantization_config, **kwargs)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = SharedConfig
    auto.AUTO_QUANTIZER_MAPPING[method] = SharedQuantizer
