"""Errors that a person caused or can mend: one line each, shown without a traceback, exit status 2."""

from __future__ import annotations


class OmniFP4Error(Exception):
    """Wrong usage or wrong input.

    The message is one line that names the subject, its value, what is allowed, and the next command to run.
    The command line prints it as it stands and exits with status 2; any other exception is our bug.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        """`message` says what is wrong with what; `hint` says what to do next."""
        self.hint = hint
        one_line = " ".join(message.split())
        super().__init__(f"{one_line} ({' '.join(hint.split())})" if hint else one_line)


class CheckpointError(OmniFP4Error):
    """A checkpoint's files are damaged, incomplete, or not what they claim to be."""


class ModelError(OmniFP4Error):
    """The model_type is unknown, or its config lacks or contradicts what the layout needs."""


class RecipeError(OmniFP4Error):
    """A recipe, component or scheme that does not exist, or that does not fit the model."""


class OutputError(OmniFP4Error):
    """The output folder exists, cannot be written, or the disk is too small."""


class ProofError(Exception):
    """An artifact that we made failed its own check: one line, exit status 1. Nothing is at OUT."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
