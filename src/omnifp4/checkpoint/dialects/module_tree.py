"""Few names for many modules: the roots of the subtrees in which nothing is quantized."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WideRoot:
    """A module, or a subtree of modules, that stays wide.

    Attributes:
        name: its full checkpoint name.
        is_leaf: it is a linear itself, not a parent of linears.
    """

    name: str
    is_leaf: bool


def wide_roots(wide: Iterable[str], quantized: Iterable[str], divided: Collection[str] = ()) -> list[WideRoot]:
    """The topmost modules that hold wide linears and no quantized one, in order of first appearance.

    Args:
        wide: full names of linears.
        quantized: full names of linears.
        divided: modules that are no roots, so that those below them are.

    Raises:
        ValueError: a module is wide and quantized, or a wide one is the parent of a quantized one.
    """
    holds_quantized: set[str] = set()
    for module in quantized:
        holds_quantized.update(_prefixes(module))
    roots: dict[str, WideRoot] = {}
    for module in wide:
        prefixes = (prefix for prefix in _prefixes(module) if prefix == module or prefix not in divided)
        root = next((prefix for prefix in prefixes if prefix not in holds_quantized), None)
        if root is None:
            raise ValueError(f"{module}: cannot stay wide, it is or holds a module that is quantized")
        roots.setdefault(root, WideRoot(root, root == module))
    return list(roots.values())


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]
