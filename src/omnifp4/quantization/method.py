"""The ways of rounding that a recipe may name, with their settings: strict data."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from omnifp4.formats.scheme import Scheme


class Weighting(StrEnum):
    """What weighs the errors between which block scales are chosen."""

    NONE = "none"
    """All weights count alike."""
    IMPORTANCE = "importance"
    """``sum h_i (w_i - w'_i)**2`` with ``h_i = E[x_i**2]``."""
    LOCAL_HESSIAN = "local-hessian"
    """``d' H d`` with the 16 x 16 Hessian of the block's inputs."""


class Need(StrEnum):
    """What must be known of a linear's inputs."""

    NOTHING = "nothing"
    STATISTICS = "statistics"
    """What a statistics file holds."""
    HESSIANS = "hessians"
    """Full Hessians, which exist only while a calibration set runs through the model."""


class Counted(StrEnum):
    """How a budget counts bits."""

    STORED = "stored"
    """Every weight once."""
    READ = "read"
    """By the share of tokens that read it: an expert's weights by experts per token over experts."""


class Score(StrEnum):
    """By what a budget tells how much a format costs the model."""

    OUTPUT = "output"
    """The share of a linear's output that is lost, every kind of linear in every layer alike."""
    GRADIENT = "gradient"
    """``sum F (w - w')**2 / 2`` with squared gradients of the model's own likelihood, which `calibrate` collected: nats."""
    KL = "kl"
    """The divergence that each layer of each component causes alone, from a sensitivity map: nats."""


LEAST_DAMPING: Final = 1e-5
"""Less is lost in float32 sums: a Hessian of fewer tokens than inputs would be as singular as before."""


class _Method(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Nearest(_Method):
    """Every value goes to the nearest code."""

    name: Literal["nearest"] = "nearest"


class Gptq(_Method):
    """See `omnifp4.algorithms.gptq`."""

    name: Literal["gptq"] = "gptq"
    damping: float = Field(default=0.03, ge=LEAST_DAMPING, le=1)
    columns: int = Field(default=128, ge=1, le=4096)


class Awq(_Method):
    """See `omnifp4.algorithms.awq`; full adds the clip search."""

    name: Literal["awq-lite", "awq-full"] = "awq-lite"
    alphas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = tuple(step / 10 for step in range(11))


class SvdQuant(_Method):
    """See `omnifp4.algorithms.svdquant`."""

    name: Literal["svdquant"] = "svdquant"
    rank: int = Field(default=32, ge=1, le=512)
    rounds: int = Field(default=3, ge=1, le=20)


class SignRound(_Method):
    """See `omnifp4.algorithms.signround`.

    Attributes:
        steps: of the descent.
        against: what is to change little: the outputs of each decoder layer, whose linears are then learned together, or
            those of each linear on its own. Linears of a layer for which there is no memory are learned on their own.
    """

    name: Literal["signround"] = "signround"
    steps: int = Field(default=200, ge=1, le=10_000)
    against: Literal["layer", "linear"] = "layer"


class Auto(_Method):
    """A format for each layer, under a budget; see `omnifp4.algorithms.budget`.

    Attributes:
        effective_bits: budget in bits a weight.
        counted: how weights are counted.
        schemes: formats to choose from.
        score: what tells how much each costs.
    """

    name: Literal["auto"] = "auto"
    effective_bits: float = Field(default=4.8, gt=0, le=16)
    counted: Counted = Counted.STORED
    schemes: tuple[Scheme, ...] = Field(default=(Scheme.NVFP4, Scheme.FP8, Scheme.WIDE), min_length=1)
    score: Score = Score.OUTPUT


Method = Annotated[Nearest | Gptq | Awq | SvdQuant | SignRound | Auto, Field(discriminator="name")]
