"""Gates of mixtures on vectors: how examples find experts, more of them at first, or by chance."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from moegen.arch.routing.router import Router
from moegen.arch.routing.select import Selection
from moegen.arch.routing.token_choice import AllExperts
from moegen.spec.element import Element, OneOf, Path
from moegen.spec.words import listed

if TYPE_CHECKING:
    from moegen.arch.mixture.layer import MixtureLayer

LOSSES = ("balance", "importance", "load", "z")


class Gating(Router):
    """How examples find experts: as tokens do, but by default each meets all of them."""

    select: Annotated[Selection, OneOf(Selection)] = Field(
        AllExperts(), description="all experts (a dense mixture), or the best k (top_k)"
    )


class Anneal(Element):
    """In training more experts at first: from `start` down to the router's k, in equal steps."""

    start: int = Field(ge=2, le=10**6, description="experts of an example at first", examples=[4])
    steps: int = Field(
        ge=1, le=10**9, description="steps of training until it is k", examples=[1000]
    )


class Stochastic(Element):
    """Every expert opens by itself, with the chance of its score; others are not run.

    Bengio, Leonard and Courville 2013; the regularisers are those of Bengio et al. 2015. Gradients
    pass the draw as if it were the chance itself (straight-through).
    """

    shorthand = "target"

    target: float = Field(
        gt=0, lt=1, description="share of experts that should be open", examples=[0.25]
    )
    weight: float = Field(
        0.1, ge=0, le=1e6, description="of the squared distance to it, by expert and by example"
    )
    variance: float = Field(
        0.0, ge=0, le=1e6, description="reward for chances that differ between examples"
    )

    @property
    def active(self) -> Fraction:
        """The target as a fraction."""
        return Fraction(self.target).limit_denominator(10**6)


def broken_loss(layer: MixtureLayer, loss: Any) -> Iterator[tuple[Path, str]]:
    """What an auxiliary loss of a layer of vectors needs."""
    if loss.kind not in LOSSES or loss.pooled:
        yield (), f"{loss.kind} is for layers of tokens; say one of {listed(LOSSES, 'and')}"
    elif layer.stochastic and loss.kind != "importance":
        yield (), f"stochastic has a loss of its own, so {loss.kind} has no use"
    elif layer.dense and loss.kind != "importance":
        yield (), f"every example meets all experts, so {loss.kind} has no use"
    else:
        experts = SimpleNamespace(nested=None, free=0)
        facts = {"capacity": None, "group": "batch", "group_kind": "batch"}
        known = {"router": layer.router, "chosen": layer.chosen, "experts": experts}
        yield from loss.check(SimpleNamespace(num_choices=layer.num_choices, **known, **facts))
