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


OTHER_LAYOUTS: Final = (
    (re.compile(r"^(thinker\.)?model\.(audio_tower|visual)\."), r"\1\2."),
    (re.compile(r"^(thinker\.)?model\.language_model\."), r"\1model."),
)
"""Names in memory of Transformers 5.21 and later, which ModelOpt writes to disk, and the names of the released
checkpoints. Earlier versions of Transformers know the latter only."""


class Renaming:
    """Sends checkpoint names to names in memory, as Transformers will."""

    def __init__(self, model: Any) -> None:
        """Read the conversions of a model that is on the meta device and still has its wide modules."""
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.aliases: dict[str, str] = {}
        """Names on disk that Transformers does not know, and what it must be told instead."""
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
        if target not in self.state:
            for layout, released in OTHER_LAYOUTS:
                alias = layout.sub(released, name)
                if alias != name:
                    found = rename_source_key(alias, self._renamings, self._converters, self._prefix, self.state)
                    if found[0] in self.state:
                        self.aliases[name] = alias
                        return found
        return target, pattern

    def check_wide(
        self, tensors: Mapping[str, TensorEntry], packed_names: frozenset[str], packed: Iterable[str], subject: str
    ) -> None:
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
        packed = set(packed)
        for name in packed:
            wanted.pop(name, None)
        merged: dict[str, dict[str, int]] = {}
        found: dict[str, str] = {}
        for name, entry in tensors.items():
            if name in packed_names or self.is_left_out(name):
                continue
            target, pattern = self._target(name)
            if target in packed:
                raise CheckpointError(f"{subject}/{entry.shard}: tensor {name!r} is there twice, wide and packed")
            if target not in wanted:
                if not is_buffer(name) and not self._ignored(target):
                    raise CheckpointError(f"{subject}/{entry.shard}: tensor {name!r} has no place in the model")
                continue
            if pattern is None and target in found:
                raise CheckpointError(
                    f"{subject}/{entry.shard}: tensors {found[target]!r} and {name!r} are the same in the model"
                )
            found[target] = name
            if pattern is not None and len(entry.shape) < len(wanted[target]):
                of_target = merged.setdefault(target, {})
                of_target[pattern] = of_target.get(pattern, 0) + 1
                continue
            if entry.shape != wanted[target] and (pattern is None or sorted(entry.shape) != sorted(wanted[target])):
                raise CheckpointError(
                    f"{subject}/{entry.shard}: tensor {name!r} is {list(entry.shape)} where the model has {list(wanted[target])}"
                )
        self._check_merged(merged, wanted, subject)
        tied = {name for pair in self._tied.items() if any(one in found for one in pair) for name in pair}
        for name in wanted:
            if name not in found and name not in tied and not self._may_miss(name):
                raise CheckpointError(f"{subject}: no tensor for {name!r} of the model")

    def _check_merged(
        self, merged: Mapping[str, Mapping[str, int]], wanted: Mapping[str, tuple[int, ...]], subject: str
    ) -> None:
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
