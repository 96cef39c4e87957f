"""Auxiliary losses: what a routed layer adds to the training objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field

from moegen.arch.routing.routed import Routed, Scored
from moegen.graph.builder import Builder
from moegen.ops.losses import (
    balance_loss,
    choice_fractions,
    masked_mean,
    mean_over_layers,
    pooled_balance_loss,
    sequence_balance_loss,
    sum_over_layers,
    z_loss,
)
from moegen.spec.element import Kinds, Path


class AuxiliaryLoss(Kinds):
    """A scalar of every routed layer, reduced over layers and weighted."""

    shorthand = "weight"
    needs_choices: ClassVar[bool] = True

    weight: float = Field(ge=0, le=1e6, description="coefficient in the total loss")
    reduction: Literal["sum", "mean"] = Field("sum", description="over the routed layers")

    @property
    def pooled(self) -> bool:
        """Whether it exists over all layers only."""
        return False

    def of_layer(self, b: Builder, scored: Scored, routed: Routed, probability: Any) -> Any:
        """The layer's own value, not weighted; probability [E] is the mean score of each expert."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def over_layers(self, b: Builder, name: str, routing: Any, chosen: int) -> Any:
        """The value over all layers, not weighted."""
        if self.reduction == "sum":
            return sum_over_layers(routing, name)
        return mean_over_layers(routing, name)


class BalanceLoss(AuxiliaryLoss):
    """E * sum_e f_e P_e: share of choices times mean score (GShard 2020, Switch 2021).

    count says what f counts: first choices only, all k choices (balanced value k), or all
    divided by k (balanced value 1). reduction "pooled" averages f and P over layers before the
    product, as transformers' models do.
    """

    kind: Literal["balance"] = "balance"
    count: Literal["first", "all", "mean"] = Field("mean", description="choices that f counts")
    reduction: Literal["sum", "mean", "pooled"] = Field(  # type: ignore[assignment]
        "sum", description="over the routed layers"
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Pooled statistics are of all choices."""
        if self.pooled and self.count == "first":
            yield ("count",), "the pooled loss counts all choices; use count all or mean"

    @property
    def pooled(self) -> bool:
        """Whether statistics are averaged over layers before the product."""
        return self.reduction == "pooled"

    def of_layer(self, b: Builder, scored: Scored, routed: Routed, probability: Any) -> Any:
        """The loss of this layer's statistics."""
        if self.count == "first":
            first = F.one_hot(routed.choices[:, 0], scored.scores.shape[-1])
            return balance_loss(masked_mean(first, scored.valid), probability)
        choices = routed.choices.shape[-1] if self.count == "all" else 1
        return balance_loss(choice_fractions(routed.load, choices), probability)

    def over_layers(self, b: Builder, name: str, routing: Any, chosen: int) -> Any:
        """Reduced as the spec says."""
        if self.pooled:
            return pooled_balance_loss(routing, chosen if self.count == "all" else 1)
        return super().over_layers(b, name, routing, chosen)


class SequenceBalanceLoss(AuxiliaryLoss):
    """Balance inside every sequence (DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""

    kind: Literal["sequence_balance"] = "sequence_balance"

    def of_layer(self, b: Builder, scored: Scored, routed: Routed, probability: Any) -> Any:
        """The loss of this layer's sequences."""
        batch, _ = scored.sequences
        return sequence_balance_loss(scored.scores, routed.choices, scored.valid, batch)


class ZLoss(AuxiliaryLoss):
    """mean LSE(logits)^2, which keeps router logits small (ST-MoE, Zoph et al. 2022)."""

    kind: Literal["z"] = "z"
    needs_choices: ClassVar[bool] = False

    def of_layer(self, b: Builder, scored: Scored, routed: Routed, probability: Any) -> Any:
        """The loss of this layer's logits."""
        return z_loss(scored.logits, scored.valid)
