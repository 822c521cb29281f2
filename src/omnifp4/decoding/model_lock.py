"""One lock for each model, or part of one, that several users share."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def model_lock(model: Any) -> threading.RLock:
    """Held while hooks or borrowed methods sit on a model, or a part of one, that several chats may share."""
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())
