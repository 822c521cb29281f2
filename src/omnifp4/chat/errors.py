"""What can go wrong in a conversation: each is one line, and the chat goes on."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from omnifp4.errors import OmniFP4Error


class ChatError(OmniFP4Error):
    """A message, an option, a speaker or a command that does not fit."""


class MediaError(ChatError):
    """An image, audio or video that is damaged, too large, of the wrong kind, or not allowed."""


class ContextError(ChatError):
    """The conversation does not fit the model's context."""


def need(module: str, purpose: str, package: str = "") -> Any:
    """Imports an optional library.

    Args:
        module: import name.
        purpose: what it is needed for, as in "reading audio".
        package: its name on the package index, where it differs.

    Raises:
        ChatError: it is not installed, or does not load.
    """
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        name = package or module.partition(".")[0]
        reason = str(error).partition("\n")[0]
        raise ChatError(
            f"{purpose} needs {name}, which does not import: {reason}", hint=f"pip install {name}"
        ) from error
