"""One NVFP4 dialect to the other, and repair of known damage."""

from omnifp4.convert.conversion import convert
from omnifp4.convert.mending import repair

__all__ = ["convert", "repair"]
