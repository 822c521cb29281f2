"""Acts right after a module has been imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .log import Log

Hook = Callable[[Any, Log], None]


class _Loader(Loader):
    def __init__(self, inner: Any, hook: Hook, log: Log) -> None:
        self._inner, self._hook, self._log = inner, hook, log

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._inner.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        # The module and what it imports must find themselves as if nobody had been in between.
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        try:
            # A lazy package may have put another object in its place.
            self._hook(sys.modules.get(module.__name__, module), self._log)
        except Exception as error:
            self._log.event("hook-failed", module=module.__name__, error=repr(error))


class Finder(MetaPathFinder):
    """Lets the other finders find a module, and wraps its loader if there is a hook for it."""

    def __init__(self, hooks: Mapping[str, Hook], log: Log) -> None:
        self._hooks, self._log = dict(hooks), log

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `MetaPathFinder.find_spec`."""
        hook = self._hooks.get(fullname)
        if hook is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, hook, self._log)
                return spec
        return None


def watch_imports(hooks: Mapping[str, Hook], log: Log) -> None:
    """Install the hooks, in front of every other finder."""
    sys.meta_path.insert(0, Finder(hooks, log))
