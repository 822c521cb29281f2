"""One NVFP4 dialect to the other, and repair of known damage."""

from omnifp4.conversion.conversion import convert
from omnifp4.conversion.mending import repair

__all__ = ["convert", "repair"]
