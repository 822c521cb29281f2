"""Reading a config.json without trusting it.

Every value is checked where it is read, and a wrong one is refused with its full key and its value. Hugging Face
omits keys that equal the config class's default, so each section of a config is read with a `Schema`: the defaults
and the second names of the class, stated as data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omnifp4.errors import ModelError

LARGEST_SIZE = 1 << 24
"""No dimension of a real model is larger (vocabularies have fewer than 300,000 entries)."""
MOST_LAYERS = 1024
MOST_EXPERT_MODULES = 1 << 18
"""Layers x experts of one decoder; a checkpoint above it would have more than 780,000 expert tensors."""


@dataclass(frozen=True, slots=True)
class Schema:
    """What a config class of Transformers says about keys that a config.json may leave out.

    Attributes:
        source: name of the config class in Transformers.
        defaults: value of each structural key that the class declares; a key that is not here has no default.
        aliases: second name under which a key may stand (the class's ``attribute_map``, reversed).
    """

    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Section:
    """One mapping of a config, with the keys under which it was found.

    Attributes:
        values: the mapping as read from JSON.
        schema: defaults and second names of its keys.
        path: dotted keys from the top of the config, empty at the top.
    """

    values: Mapping[Any, Any]
    schema: Schema
    path: str = ""

    def key(self, name: str) -> str:
        """The full key of `name`, as errors show it."""
        return f"{self.path}.{name}" if self.path else name

    def refuse(self, name: str, value: object, wanted: str) -> ModelError:
        """The error that says what `value` of `name` should have been."""
        return ModelError(f"config: {self.key(name)} is {show(value)}: it must be {wanted}")

    def get(self, name: str) -> Any:
        """The value of `name` or its default.

        Raises:
            ModelError: it is absent and has no default, or its two names contradict each other.
        """
        value = self.values.get(name, _ABSENT)
        alias = self.schema.aliases.get(name)
        second = self.values.get(alias, _ABSENT) if alias else _ABSENT
        if value is _ABSENT:
            value = second
        elif second is not _ABSENT and second != value:
            other = f"{self.key(str(alias))}, its other name, is {show(second)}"
            raise ModelError(f"config: {self.key(name)} is {show(value)} but {other}")
        if value is _ABSENT:
            value = self.schema.defaults.get(name, _ABSENT)
        if value is _ABSENT:
            raise ModelError(f"config: {self.key(name)} is missing, and the layout depends on it")
        return value

    def size(self, name: str, *, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """An integer from `least` to `most`."""
        value = self.get(name)
        if not _is_integer(value) or not least <= value <= most:
            raise self.refuse(name, value, f"an integer from {least} to {most}")
        return int(value)

    def optional_size(self, name: str) -> int | None:
        """A positive integer, or None where the key is absent without default, or null."""
        known = name in self.values or name in self.schema.defaults
        return None if not known or self.get(name) is None else self.size(name)

    def layers(self, name: str) -> int:
        """A number of layers (or of other modules in a row)."""
        return self.size(name, most=MOST_LAYERS)

    def flag(self, name: str) -> bool:
        """true or false."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return value

    def integers(self, name: str, *, least: int = 1) -> tuple[int, ...]:
        """A list of integers, each at least `least`; null reads as an empty one."""
        value = self.get(name)
        if value is None:
            return ()
        if (
            not isinstance(value, Sequence)
            or isinstance(value, str | bytes)
            or len(value) > MOST_LAYERS
            or not all(_is_integer(item) and least <= item <= LARGEST_SIZE for item in value)
        ):
            raise self.refuse(name, value, f"a list of integers from {least} to {LARGEST_SIZE}")
        return tuple(value)

    def require(self, name: str, *allowed: str) -> None:
        """Asserts an assumption of the layout: the value of `name` is one of `allowed`."""
        value = self.get(name)
        if not isinstance(value, str) or value not in allowed:
            raise self.refuse(name, value, " or ".join(repr(item) for item in allowed))

    def architecture(self) -> str:
        """The first of ``architectures``: the class that wrote the checkpoint; empty where the config has none."""
        value = self.values.get("architectures")
        if value is None:
            return ""
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.refuse("architectures", value, "a list of class names")
        return str(value[0]) if value else ""

    def section(self, name: str, schema: Schema) -> Section:
        """The mapping under `name`.

        Raises:
            ModelError: it is absent or no mapping.
        """
        found = self.optional_section(name, schema)
        if found is None:
            raise ModelError(f"config: {self.key(name)} is missing, and the layout depends on it")
        return found

    def optional_section(self, name: str, schema: Schema) -> Section | None:
        """The mapping under `name`, or None where it is absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(name, value, "a mapping")
        return Section(value, schema, self.key(name))


def show(value: object) -> str:
    """`value` for an error message: short, on one line, and never failing."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):
        # Python refuses to print integers of thousands of digits, and a nest can be too deep to print.
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
