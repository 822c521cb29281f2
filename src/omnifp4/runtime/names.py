"""Transformers' own renaming of checkpoint tensors for one model, and the check of the tensors it will load itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from omnifp4.checkpoint.header import TensorEntry
from omnifp4.errors import CheckpointError
from omnifp4.models.base import is_buffer

OPTIONAL_PARTS: Final = ("talker", "code2wav", "token2wav")
"""Parts of an omni checkpoint that a model may be built without; the thinker alone has none of them."""


class Renaming:
    """Sends checkpoint names to names in memory, as Transformers will."""

    def __init__(self, model: Any) -> None:
        """Read the conversions of a model that is on the meta device and still has its wide modules."""
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.state: dict[str, Any] = dict(model.state_dict())
        self._ignored = _any_of(getattr(model, "_keys_to_ignore_on_load_unexpected", None))
        self._may_miss = _any_of(getattr(model, "_keys_to_ignore_on_load_missing", None))
        self._tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {}) or {}
        children = {name for name, _ in model.named_children()}
        self._left_out = tuple(f"{part}." for part in OPTIONAL_PARTS if part not in children)

    def is_left_out(self, name: str) -> bool:
        """Whether a tensor belongs to a part that this model was built without."""
        return name.startswith(self._left_out)

    def target(self, name: str) -> str:
        """The name in memory of the tensor that is `name` on disk; of a tensor to be merged, what it is merged into."""
        return self._target(name)[0]

    def _target(self, name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.state)
        if target not in self.state and name in self.state:
            target, pattern = rename_source_key(name, [], [], self._prefix, self.state)
        return target, pattern

    def check_wide(self, tensors: Mapping[str, TensorEntry], packed_names: frozenset[str], packed: Iterable[str], subject: str) -> None:
        """Check the tensors that Transformers loads itself, which would only warn.

        Args:
            tensors: of the checkpoint.
            packed_names: those that it does not load.
            packed: names in memory of the weights that become packed.
            subject: the checkpoint, for messages.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of the wrong shape.
        """
        wanted = {name: tuple(value.shape) for name, value in self.state.items()}
        for name in packed:
            wanted.pop(name, None)
        merged: dict[str, dict[str, int]] = {}
        found: set[str] = set()
        for name, entry in tensors.items():
            if name in packed_names or self.is_left_out(name):
                continue
            target, pattern = self._target(name)
            if target not in wanted:
                if not is_buffer(name) and not self._ignored(target):
                    raise CheckpointError(f"{subject}/{entry.shard}: tensor {name!r} has no place in the model")
                continue
            found.add(target)
            if pattern is not None and len(entry.shape) < len(wanted[target]):
                of_target = merged.setdefault(target, {})
                of_target[pattern] = of_target.get(pattern, 0) + 1
                continue
            if entry.shape != wanted[target] and (pattern is None or sorted(entry.shape) != sorted(wanted[target])):
                raise CheckpointError(
                    f"{subject}/{entry.shard}: tensor {name!r} is {list(entry.shape)} where the model has {list(wanted[target])}"
                )
        self._check_merged(merged, wanted, subject)
        for name in wanted:
            if name not in found and not self._may_miss(name) and self._tied.get(name) not in found:
                if not (name in self._tied.values() and any(self._tied[k] == name and k in found for k in self._tied)):
                    raise CheckpointError(f"{subject}: no tensor for {name!r} of the model")

    def _check_merged(self, merged: Mapping[str, Mapping[str, int]], wanted: Mapping[str, tuple[int, ...]], subject: str) -> None:
        for target, counts in merged.items():
            parts = 2 if target.endswith("gate_up_proj") else 1
            if len(counts) != parts or any(count != wanted[target][0] for count in counts.values()):
                raise CheckpointError(
                    f"{subject}: {sum(counts.values())} tensors for {target!r} where {parts} x {wanted[target][0]} are needed"
                )


def _any_of(patterns: Iterable[str] | None) -> Any:
    """A predicate: whether one of the patterns is found in a name."""
    compiled = [re.compile(pattern) for pattern in patterns or ()]
    return lambda name: any(pattern.search(name) for pattern in compiled)
