"""The family of auxiliary losses: what a routed layer adds to the training objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from moegen.arch.routing.routed import Routed, Scored
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.losses import mean_over_layers, sum_over_layers
from moegen.spec.element import Kinds, Path
from moegen.spec.words import counted

if TYPE_CHECKING:
    from moegen.arch.experts import Decided
    from moegen.arch.moe import MoE


@dataclass(frozen=True)
class Outcome:
    """What a routed layer did, for losses to look at.

    probability [E]: mean score of each expert over real tokens; inside: what was decided inside
    experts, None if they are no mixtures.
    """

    moe: MoE
    scored: Scored
    routed: Routed
    probability: Any
    inside: Decided | None


class AuxiliaryLoss(Kinds):
    """A scalar of every routed layer, reduced over layers and weighted."""

    shorthand = "weight"
    needs_choices: ClassVar[bool] = True  # of tokens
    needs_learned: ClassVar[bool] = True  # scores
    by_group: ClassVar[bool] = False  # of tokens that compete
    needs_loads: ClassVar[bool] = False  # that can be uneven

    weight: float = Field(
        ge=0, le=1e6, description="coefficient in the total loss", examples=[0.01]
    )
    reduction: Literal["sum", "mean"] = Field("sum", description="over the routed layers")

    @property
    def pooled(self) -> bool:
        """Whether it exists over all layers only."""
        return False

    def ids(self) -> tuple[str, ...]:
        """Names of the ids that it reads."""
        return ()

    def check(self, moe: MoE) -> Iterator[tuple[Path, str]]:
        """What it needs of the layer."""
        select = moe.router.select
        if self.needs_choices and not select.tokens_choose:
            yield (), f"loads under {select.kind} are equal, so {self.kind} has no use"
        elif self.needs_learned and not moe.router.score.learned:
            yield (), f"a {moe.router.score.kind} learns nothing, so {self.kind} has no use"
        elif self.needs_loads and select.even_loads:
            yield (), f"loads under {select.kind} are equal, so {self.kind} has no use"

    def what(self, setting: Setting) -> str:
        """What is small where the loss is small; its summary unless told."""
        return self.summary().rstrip(".")

    def says(self, setting: Setting) -> Iterator[str]:
        """What it is, its weight, and how layers are reduced."""
        layers = setting.routed_layers
        over = f"the {counted(layers, 'routed layer')}"
        reduced = {"sum": f"summed over {over}", "mean": f"the mean over {over}"}
        how = reduced.get(self.reduction, f"of statistics averaged over {over}")
        apart = setting.stacks > 1 and self.reduction != "sum"
        how += ", of each stack apart and then added" if apart else ""
        how = "" if layers == 1 else f", {how}"
        yield f"{self.weight:g} times {self.what(setting)}{how}."

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The layer's own value, not weighted."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def pools(self, b: Builder, outcome: Outcome) -> dict[str, Any]:
        """What a pooled loss needs of a layer beside its load and mean scores: record fields."""
        return {}

    def over_layers(self, b: Builder, name: str, routing: Any, moe: MoE) -> Any:
        """The value over all layers, not weighted."""
        if self.reduction == "sum":
            return sum_over_layers(routing, name)
        return mean_over_layers(routing, name)
