"""Capacity: how many tokens an expert takes, and what becomes of the others."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moegen.graph.builder import Builder
from moegen.ops.capacity import expert_capacity, in_mode
from moegen.spec.element import Element


class Capacity(Element):
    """A bound on the rows of each expert; tokens beyond it keep only the residual path.

    Two conventions are in use: per_token does not multiply by k (Mesh-TF, Switch, ST-MoE),
    per_choice does (V-MoE, Tutel, MegaBlocks).
    """

    shorthand = "factor"

    factor: float = Field(gt=0, le=1e6, description="room in training, 1 is an even share")
    eval_factor: float | None = Field(None, gt=0, le=1e6, description="in evaluation; as factor")
    convention: Literal["per_token", "per_choice"] = Field(
        "per_token", description="whether an even share counts tokens, or choices (k a token)"
    )
    minimum: int = Field(0, ge=0, le=10**6, description="slots that an expert always has")
    rounding: Literal["floor", "ceil", "nearest"] = Field("floor", description="to whole slots")
    multiple: int = Field(1, ge=1, le=10**6, description="slots are raised to a multiple of this")
    priority: Literal["rank"] = Field(
        "rank", description="who comes first: all first choices in token order, then all second"
    )
    overflow: Literal["drop"] = Field(
        "drop", description="a choice beyond capacity contributes nothing"
    )

    def slots(self, b: Builder, tokens: Any, chosen: int, experts: int) -> Any:
        """Slots of each expert for tokens [T, d], a whole number."""
        factor: Any = self.factor
        if self.eval_factor not in (None, self.factor):
            factor = in_mode(b.training, self.factor, self.eval_factor)
        choices = tokens.shape[0]
        if self.convention == "per_choice" and chosen > 1:
            choices = choices * chosen
        options: dict[str, Any] = {}
        if self.rounding != "floor":
            options["rounding"] = self.rounding
        if self.minimum:
            options["minimum"] = self.minimum
        if self.multiple != 1:
            options["multiple"] = self.multiple
        return expert_capacity(choices, experts, factor, **options)
