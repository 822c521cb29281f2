"""Recipes: which components are quantized, in which scheme and how. Named, strict, versioned data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from omnifp4.checkpoint.dialects import Activations
from omnifp4.errors import RecipeError
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.formats.scheme import Scheme
from omnifp4.models.base import Component, Kind, Layout, Part
from omnifp4.quantization.method import (
    Auto,
    Awq,
    Counted,
    Gptq,
    Method,
    Nearest,
    Need,
    Score,
    SignRound,
    SvdQuant,
    Weighting,
)

SCHEMES: Final = tuple(Scheme)
"""What ``--component NAME=SCHEME`` takes."""

MLPS: Final = ("experts", "shared_experts", "mlp")
LINEARS: Final = ("attention", *MLPS)

WEIGHTED_RULES: Final = {weighting.value: weighting for weighting in Weighting if weighting is not Weighting.NONE}
"""Names that ``--rule`` takes beside those of `ScaleRule`: the sweep, its errors weighed by what is known of the inputs."""

MOST_NAME: Final = 80
"""Characters of a recipe's name."""


COMPONENT_NAMES: Final = frozenset(Component(part, kind).name for part in Part for kind in Kind)


class Recipe(BaseModel):
    """What a name given to ``--recipe`` stands for.

    Attributes:
        name: as on the command line.
        version: raised when the same name gives other bytes.
        title: one line for people.
        components: scheme by component name; what is not named stays wide.
        rule: how scales are chosen.
        weighting: what weighs the errors between which the rule chooses.
        method: how values are rounded.
        activations: what happens to the inputs of NVFP4 linears.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=MOST_NAME)
    version: int = Field(ge=1)
    title: str = ""
    components: dict[str, Scheme]
    rule: ScaleRule = ScaleRule.SWEEP
    weighting: Weighting = Weighting.NONE
    method: Method = Nearest()
    activations: Activations = Activations.WIDE

    @field_validator("name", "title")
    @classmethod
    def _printable(cls, text: str) -> str:
        if not text.isprintable():
            raise ValueError("it holds characters that cannot be shown, such as a new line")
        return text

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.weighting is not Weighting.NONE and self.rule is not ScaleRule.SWEEP:
            raise ValueError(
                f"rule {self.rule.value!r} weighs no errors, so weighting {self.weighting.value!r} has no use: take rule "
                f"{ScaleRule.SWEEP.value!r} or weighting {Weighting.NONE.value!r}"
            )
        return self

    @field_validator("components")
    @classmethod
    def _known(cls, components: dict[str, Scheme]) -> dict[str, Scheme]:
        for name in components:
            if name not in COMPONENT_NAMES:
                raise ValueError(f"no model has a component {name!r}; omnifp4 plan MODEL lists them")
        return components

    def scheme_of(self, component: Component) -> Scheme:
        """What the linears of a component become."""
        return self.components.get(component.name, Scheme.WIDE)

    @property
    def rule_name(self) -> str:
        """As ``--rule`` takes it."""
        return self.rule.value if self.weighting is Weighting.NONE else self.weighting.value

    @property
    def need(self) -> Need:
        """What must be known of the inputs."""
        if isinstance(self.method, Gptq | SvdQuant | SignRound):
            return Need.HESSIANS
        plain = isinstance(self.method, Nearest) and self.weighting is Weighting.NONE
        return Need.NOTHING if plain and self.activations is Activations.WIDE else Need.STATISTICS

    @property
    def rank(self) -> int:
        """Of the branch beside each NVFP4 linear; 0 where there is none."""
        return self.method.rank if isinstance(self.method, SvdQuant) else 0

    def with_rule(self, name: str | None) -> Recipe:
        """The recipe with another scale rule, by name; None leaves it.

        Raises:
            RecipeError: the rule is unknown, or the method has no use for it.
        """
        if name is None:
            return self
        if name in WEIGHTED_RULES:
            return self.model_copy(update={"rule": ScaleRule.SWEEP, "weighting": WEIGHTED_RULES[name]})
        return self.model_copy(update={"rule": find_rule(name), "weighting": Weighting.NONE})

    def with_budget(self, effective_bits: float | None, counted: str | None, choose_by: str | None = None) -> Recipe:
        """The recipe with another budget; None leaves what it has.

        Raises:
            RecipeError: the recipe has no budget, or the value is out of range.
        """
        if effective_bits is None and counted is None and choose_by is None:
            return self
        if not isinstance(self.method, Auto):
            raise RecipeError(f"recipe {self.name!r} has no budget of bits", hint="--recipe nvfp4-auto takes one")
        if counted is not None and counted not in tuple(Counted):
            raise RecipeError(f"bits counted {counted!r}: allowed are {' and '.join(Counted)}")
        if effective_bits is not None and not 0 < effective_bits <= 16:
            raise RecipeError(f"effective bits {effective_bits:g}: allowed is a number above 0 and up to 16")
        if choose_by is not None and choose_by not in tuple(Score):
            raise RecipeError(f"choose by {choose_by!r}: allowed are {', '.join(Score)}")
        update: dict[str, Any] = {}
        if choose_by is not None:
            update["score"] = Score(choose_by)
        if effective_bits is not None:
            update["effective_bits"] = effective_bits
        if counted is not None:
            update["counted"] = Counted(counted)
        return self.model_copy(update={"method": self.method.model_copy(update=update)})


def _nvfp4(part: str, kinds: Iterable[str]) -> dict[str, Scheme]:
    return {f"{part}.{kind}": Scheme.NVFP4 for kind in kinds}


_THINKER: Final = _nvfp4("thinker", LINEARS)

_SPEECH_BEARS: Final = {
    "talker.experts": Scheme.FP8,
    "talker.attention": Scheme.FP8,
    "talker.shared_experts": Scheme.FP8,
}
"""As ``benchmarks/speech_recipes.py`` found. Projections and codec head were borne too; they stay wide, because they are a
thousandth of a released model, and engines build them without a quantization config."""

RECIPES: Final[dict[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="nvfp4", version=1, title="experts, MLPs and attention of the thinker", components=_THINKER),
        Recipe(
            name="nvfp4-mlp",
            version=1,
            title="experts and MLPs of the thinker only",
            components=_nvfp4("thinker", MLPS),
        ),
        Recipe(
            name="nvfp4-thinker-talker",
            version=1,
            title="experts, MLPs and attention of thinker and talker",
            components=_THINKER | _nvfp4("talker", LINEARS),
        ),
        Recipe(
            name="nvfp4-speech",
            version=1,
            title="the thinker, and the talker's experts and attention in fp8, which is what speech bears",
            components=_THINKER | _SPEECH_BEARS,
        ),
        Recipe(
            name="nvfp4-w4a4",
            version=1,
            title="the thinker with FP4 activations too: an input scale for every linear and expert",
            components=_THINKER,
            activations=Activations.FP4,
        ),
        Recipe(
            name="nvfp4-importance",
            version=1,
            title="block scales chosen by errors weighed with E[x^2]",
            components=_THINKER,
            weighting=Weighting.IMPORTANCE,
        ),
        Recipe(
            name="nvfp4-local-hessian",
            version=1,
            title="block scales chosen by the error of each block's output",
            components=_THINKER,
            weighting=Weighting.LOCAL_HESSIAN,
        ),
        Recipe(
            name="nvfp4-gptq",
            version=1,
            title="GPTQ with static scales",
            components=_THINKER,
            weighting=Weighting.IMPORTANCE,
            method=Gptq(),
        ),
        Recipe(
            name="nvfp4-awq-lite",
            version=2,
            title="AWQ: channels scaled by their inputs, folded into what comes before",
            components=_THINKER,
            weighting=Weighting.IMPORTANCE,
            method=Awq(),
        ),
        Recipe(
            name="nvfp4-awq-full",
            version=2,
            title="AWQ with a clip search for each block",
            components=_THINKER,
            weighting=Weighting.IMPORTANCE,
            method=Awq(name="awq-full"),
        ),
        Recipe(
            name="nvfp4-svdquant",
            version=1,
            title="a BF16 branch of rank 32 beside every FP4 weight; runs here only",
            components=_THINKER,
            weighting=Weighting.IMPORTANCE,
            method=SvdQuant(),
        ),
        Recipe(
            name="nvfp4-signround",
            version=2,
            title="rounding learned by sign gradients, a layer at a time",
            components=_THINKER,
            weighting=Weighting.IMPORTANCE,
            method=SignRound(),
        ),
        Recipe(
            name="nvfp4-auto",
            version=1,
            title="nvfp4, fp8 or bf16 for each layer under a budget of bits",
            components=_THINKER,
            method=Auto(),
        ),
    )
}
DEFAULT_RECIPE: Final = "nvfp4"


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or of that file (a path that ends in .json).

    Raises:
        RecipeError: unknown, with the known ones; or a file that is no recipe, with the key that is wrong.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".json"):
        return read_recipe(Path(name).expanduser())
    raise RecipeError(
        f"recipe {name!r} is unknown; known are {', '.join(RECIPES)}", hint="or give a file whose name ends in .json"
    )


def read_recipe(path: Path) -> Recipe:
    """A recipe of the user's own.

    Raises:
        RecipeError: unreadable, no JSON, or a key or value that a recipe does not have.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read: {error.strerror}") from None
    except _TwiceError as error:
        raise RecipeError(f"recipe {path}: key {str(error)!r} stands twice") from None
    except (ValueError, RecursionError):
        raise RecipeError(f"recipe {path}: is not JSON") from None
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise RecipeError(f"recipe {path}: {_first_problem(error)}") from None
    if recipe.name in RECIPES:
        raise RecipeError(f"recipe {path}: name {recipe.name!r} is that of a bundled recipe; choose another")
    return recipe


class _TwiceError(ValueError):
    """A key of a JSON object that stands in it twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(key)
        found[key] = value
    return found


def _first_problem(error: ValidationError) -> str:
    """One line for the first thing that is wrong."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place)
    if problem["type"] == "extra_forbidden":
        return f"key {key!r} is unknown; known are {', '.join(_keys_beside(place))}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    told = problem["msg"].removeprefix("Value error, ")
    told = told[0].lower() + told[1:]
    return f"key {key!r} is {problem['input']!r}: {told}" if key else told


def _keys_beside(place: list[str]) -> Iterable[str]:
    if len(place) > 1 and place[0] == "method":
        union = get_args(Method)[0]
        for model in get_args(union):
            if place[1] in get_args(model.model_fields["name"].annotation):
                return list(model.model_fields)
    return list(Recipe.model_fields)


def find_rule(name: str) -> ScaleRule:
    """The scale rule of that name; raises RecipeError that lists the known ones."""
    try:
        return ScaleRule(name)
    except ValueError:
        known = ", ".join((*ScaleRule, *WEIGHTED_RULES))
        raise RecipeError(f"scale rule {name!r} is unknown; known are {known}") from None


def parse_overrides(texts: Iterable[str]) -> dict[str, Scheme]:
    """Parse ``NAME=fp8`` and the like, as given to ``--component``; see `Scheme` for what may be asked."""
    overrides: dict[str, Scheme] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or value not in SCHEMES:
            raise RecipeError(f"component {text!r} is not NAME=SCHEME; schemes are {', '.join(SCHEMES)}")
        scheme = Scheme(value)
        if overrides.setdefault(name, scheme) != scheme:
            raise RecipeError(f"component {name!r} is given twice, as {overrides[name]} and as {scheme}")
    return overrides


def choose_schemes(layout: Layout, recipe: Recipe, overrides: Mapping[str, Scheme]) -> dict[Component, Scheme]:
    """The scheme of every component: what the recipe says, unless an override names the component or its part.

    Raises:
        RecipeError: an override names no component of this model, or asks for a quantization where there is no linear.
    """
    linear = {tensor.component for tensor in layout.tensors if tensor.is_linear}
    schemes = {
        component: recipe.scheme_of(component) if component in linear else Scheme.WIDE
        for component in layout.components
    }
    by_part_first = sorted(overrides.items(), key=lambda item: "." in item[0])
    for name, scheme in by_part_first:
        exact = [component for component in layout.components if component.name == name]
        chosen = exact or [component for component in layout.components if component.part.value == name]
        if not chosen:
            known = ", ".join(component.name for component in layout.components if component in linear)
            raise RecipeError(f"component {name!r} is not in this {layout.model_type}; it has {known}")
        if not scheme.is_wide and not linear.intersection(chosen):
            raise RecipeError(f"component {name!r} has no linear layer, so it cannot be {scheme}")
        schemes.update({component: scheme for component in chosen if scheme.is_wide or component in linear})
    if all(scheme.is_wide for scheme in schemes.values()):
        raise RecipeError(
            f"recipe {recipe.name!r} with these components leaves nothing of this {layout.model_type} to quantize"
        )
    return schemes
