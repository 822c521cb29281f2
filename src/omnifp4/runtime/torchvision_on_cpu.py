"""Lets torchvision import beside a CPU build of torch.

The processor's video part needs torchvision, whose published wheel is a CUDA build: beside a CPU build of torch its
compiled library does not load, and its import then dies because two operators that the library would declare are
missing. None of the code that the processor runs calls them, so declaring their signatures is enough.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

_declared: list[Any] = []
"""Declarations vanish with the object that made them."""


def declare_missing_operators() -> str:
    """Declares the two operators where, and only where, torchvision could not be imported without them.

    Call it before the first import of torchvision or of a transformers model.

    Returns:
        What was done and why, for a test log.
    """
    if importlib.util.find_spec("torch") is None:
        return "nothing: torch is not installed"
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return "nothing: torchvision is not installed"
    # Any, because torch's own stubs leave the functions below untyped.
    torch: Any = importlib.import_module("torch")
    if torch.version.cuda is not None:
        return "nothing: torch is a CUDA build"
    if hasattr(torch.ops.torchvision, "nms"):
        return "nothing: the operators are declared"
    libraries = sorted(Path(spec.origin).parent.glob("_C*.so"))
    try:
        for path in libraries:
            torch.ops.load_library(str(path))
    except OSError as error:
        reason = str(error).partition("\n")[0]
    else:
        if libraries:
            return "nothing: torchvision's own library loads"
        reason = "torchvision has no compiled library"
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return f"declared torchvision::nms and ::qnms: {reason}"
