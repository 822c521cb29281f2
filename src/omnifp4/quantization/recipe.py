"""Recipes: which components become FP4 and by which scale rule. Named, versioned data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from omnifp4.errors import RecipeError
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.models.base import Component, Kind, Layout, Part

NVFP4: Final = "nvfp4"
WIDE: Final = "bf16"
"""Left as it is: BF16 in nearly every checkpoint, and untouched where it is another type."""

SCHEMES: Final = (NVFP4, WIDE)

MLP_KINDS: Final = frozenset({Kind.EXPERTS, Kind.SHARED_EXPERTS, Kind.MLP})
LINEAR_KINDS: Final = MLP_KINDS | {Kind.ATTENTION}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a name given to ``--recipe`` stands for.

    Attributes:
        name: as on the command line.
        version: raised when the same name gives other bytes.
        title: one line for people.
        kinds: kinds of component that become FP4, by part.
        rule: how scales are chosen.
    """

    name: str
    version: int
    title: str
    kinds: Mapping[Part, frozenset[Kind]]
    rule: ScaleRule = ScaleRule.SWEEP

    def takes(self, component: Component) -> bool:
        """Whether the recipe makes the linears of a component FP4."""
        return component.kind in self.kinds.get(component.part, frozenset())


RECIPES: Final[dict[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Recipe("nvfp4", 1, "experts, MLPs and attention of the thinker", {Part.THINKER: LINEAR_KINDS}),
        Recipe("nvfp4-mlp", 1, "experts and MLPs of the thinker only", {Part.THINKER: MLP_KINDS}),
        Recipe(
            "nvfp4-thinker-talker",
            1,
            "experts, MLPs and attention of thinker and talker",
            {Part.THINKER: LINEAR_KINDS, Part.TALKER: LINEAR_KINDS},
        ),
    )
}
DEFAULT_RECIPE: Final = "nvfp4"


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; raises RecipeError that lists the known ones."""
    if name not in RECIPES:
        raise RecipeError(f"recipe {name!r} is unknown; known are {', '.join(RECIPES)}")
    return RECIPES[name]


def find_rule(name: str) -> ScaleRule:
    """The scale rule of that name; raises RecipeError that lists the known ones."""
    try:
        return ScaleRule(name)
    except ValueError:
        raise RecipeError(f"scale rule {name!r} is unknown; known are {', '.join(ScaleRule)}") from None


def parse_overrides(texts: Iterable[str]) -> dict[str, str]:
    """Parse ``NAME=nvfp4`` and ``NAME=bf16``, as given to ``--component``."""
    overrides: dict[str, str] = {}
    for text in texts:
        name, separator, scheme = text.partition("=")
        if not separator or scheme not in SCHEMES:
            raise RecipeError(f"component {text!r} is not NAME={' or NAME='.join(SCHEMES)}")
        if overrides.setdefault(name, scheme) != scheme:
            raise RecipeError(f"component {name!r} is given twice, as {overrides[name]} and as {scheme}")
    return overrides


def choose_schemes(layout: Layout, recipe: Recipe, overrides: Mapping[str, str]) -> dict[Component, str]:
    """The scheme of every component: what the recipe says, unless an override names the component or its part.

    Raises:
        RecipeError: an override names no component of this model, or asks for FP4 where there is no linear.
    """
    linear = {tensor.component for tensor in layout.tensors if tensor.is_linear}
    schemes = {component: NVFP4 if recipe.takes(component) else WIDE for component in layout.components}
    by_part_first = sorted(overrides.items(), key=lambda item: "." in item[0])
    for name, scheme in by_part_first:
        exact = [component for component in layout.components if component.name == name]
        chosen = exact or [component for component in layout.components if component.part.value == name]
        if not chosen:
            known = ", ".join(component.name for component in layout.components if component in linear)
            raise RecipeError(f"component {name!r} is not in this {layout.model_type}; it has {known}")
        if scheme == NVFP4 and not linear.intersection(chosen):
            raise RecipeError(f"component {name!r} has no linear layer, so it cannot be {NVFP4}")
        schemes.update({component: scheme for component in chosen if scheme == WIDE or component in linear})
    if NVFP4 not in schemes.values():
        raise RecipeError(
            f"recipe {recipe.name!r} with these components leaves nothing of this {layout.model_type} to quantize"
        )
    return schemes
