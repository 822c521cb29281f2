"""Acts when Transformers or torchvision is imported, so that importing omnifp4 itself imports neither.

`install` puts a finder in front of Python's own. It loads nothing: it lets the usual finders find a module, and

* after ``transformers.quantizers.auto`` (where Transformers keeps its quantizers) has run, registers ours;
* before ``torchvision`` runs, declares the operators without which it fails beside a CPU build of torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Final

QUANTIZERS: Final = "transformers.quantizers.auto"
TORCHVISION: Final = "torchvision"


class RegisteringLoader(Loader):
    """Runs a module with its own loader, then registers."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the inner loader."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the inner loader; then register."""
        self._inner.exec_module(module)
        # What comes after must find the module as if nobody had been in between.
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        # registration imports this very module, and finds it: it has run.
        from omnifp4.runtime.registration import register

        register()


class ImportHook(MetaPathFinder):
    """See the module."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the module to act on; None, which leaves it to the other finders, for any other."""
        if fullname not in (QUANTIZERS, TORCHVISION) or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            if fullname == TORCHVISION:
                from omnifp4.runtime.torchvision_on_cpu import declare_missing_operators

                declare_missing_operators()
                return None
            spec = PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = RegisteringLoader(spec.loader)
            return spec
        finally:
            self._busy.discard(fullname)


def install() -> None:
    """Register now if Transformers is in use already, and else when it comes to be; again changes nothing."""
    if QUANTIZERS in sys.modules:
        from omnifp4.runtime.registration import register

        register()
    if not any(isinstance(finder, ImportHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, ImportHook())
