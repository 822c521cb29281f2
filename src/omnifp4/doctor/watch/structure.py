"""What a model in memory is made of."""

from __future__ import annotations

from typing import Any

PACKED_CLASSES = ("NVFP4Linear", "PackedExperts", "CompressedLinear", "Linear4bit", "WQLinear", "QuantLinear")
PACKED_DTYPES = ("uint8", "int8", "int32")


def structure_of(model: Any) -> dict[str, Any]:
    """Modules, parameters, attention classes, bytes by dtype, and how much is quantized."""
    modules = 0
    attention: dict[str, int] = {}
    quantized = packed = 0
    for module in model.modules():
        modules += 1
        name = type(module).__name__
        if name.endswith("Attention"):
            attention[name] = attention.get(name, 0) + 1
        rounded = _rounded(module)
        codes = _codes(module) if name in PACKED_CLASSES or _has_scales(module) else 0
        quantized += rounded + codes
        packed += codes
    parameters = 0
    dtypes: dict[str, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + tensor.numel() * tensor.element_size()
    for tensor in model.parameters():
        parameters += tensor.numel()
    stored = sum(tensor.numel() for tensor in model.parameters() if str(tensor.dtype) == "torch.uint8")
    return {
        "model": type(model).__name__,
        "modules": modules,
        "parameters": parameters + (stored if packed else 0),
        "attention": attention,
        "dtypes": dtypes,
        "quantized": quantized,
        "packed": packed > 0,
    }


def _rounded(module: Any) -> int:
    """Weights of a module that ModelOpt rounds on the way; they stay wide in memory."""
    quantizer = getattr(module, "weight_quantizer", None)
    weight = getattr(module, "weight", None)
    if quantizer is None or weight is None or not hasattr(weight, "numel"):
        return 0
    return int(weight.numel()) if getattr(quantizer, "is_enabled", True) else 0


def _has_scales(module: Any) -> bool:
    names = {*getattr(module, "_parameters", {}), *getattr(module, "_buffers", {})}
    return any(name.endswith(("weight_scale", "block_scale", "qzeros", "absmax")) for name in names)


def _codes(module: Any) -> int:
    """Weights in the codes that a module holds itself: two a byte."""
    own = [*getattr(module, "_parameters", {}).values(), *getattr(module, "_buffers", {}).values()]
    count = 0
    for tensor in own:
        dtype = str(getattr(tensor, "dtype", "")).removeprefix("torch.")
        if dtype in PACKED_DTYPES and getattr(tensor, "dim", int)() >= 2:
            count += int(tensor.numel()) * {"uint8": 2, "int8": 1, "int32": 8}[dtype]
    return count
