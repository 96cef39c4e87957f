"""Losses of entropy and information: LIMoE 2022, Mod-Squad 2023."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from moegen.arch.losses.auxiliary import AuxiliaryLoss, Outcome
from moegen.arch.routing.ids import IdName, named
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.importance import dense_gates
from moegen.ops.information import global_entropy, local_entropy, mutual_information
from moegen.spec.element import Path

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


class _Entropy(AuxiliaryLoss):
    """Of all tokens, or of those of one id, such as a modality."""

    needs_choices: ClassVar[bool] = False
    id: IdName | None = Field(None, description="name of the ids that forward is given")
    of: int = Field(0, ge=0, le=10**6, description="only tokens of this id")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """One id of something."""
        if self.id is None and "of" in self.model_fields_set:
            yield ("of",), "of is one of the ids; name them by id"

    def ids(self) -> tuple[str, ...]:
        """The one it is named after."""
        return (self.id,) if self.id else ()

    def check(self, moe: MoE) -> Iterator[tuple[Path, str]]:
        """Scores that are probabilities."""
        yield from super().check(moe)
        if moe.router.affinity.kind != "softmax":
            yield (), f"{self.kind} is of probabilities; it needs affinity softmax"

    def _tokens(self) -> str:
        return f"tokens of {named(self.id)} {self.of}" if self.id else "tokens"

    def _valid(self, outcome: Outcome) -> Any:
        site = outcome.scored.site
        return site.valid & (site.ids[self.id] == self.of) if self.id else site.valid


class LocalEntropyLoss(_Entropy):
    """Mean entropy of a token's scores: low where the router is sure (LIMoE, Mustafa et al.)."""

    kind: Literal["local_entropy"] = "local_entropy"

    def what(self, setting: Setting) -> str:
        """Of which tokens."""
        return f"the mean entropy of the scores of {self._tokens()}"

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer."""
        return local_entropy(outcome.scored.scores, self._valid(outcome))


class GlobalEntropyLoss(_Entropy):
    """Minus the entropy of mean scores: low where many experts are used (LIMoE)."""

    kind: Literal["global_entropy"] = "global_entropy"
    spread: float | None = Field(
        None, gt=0, le=1e7, description="experts to use at least: max(0, ln spread - entropy)"
    )

    def what(self, setting: Setting) -> str:
        """Of which tokens, and from where on it is satisfied."""
        entropy = f"the entropy of the mean scores of {self._tokens()}"
        if self.spread is None:
            return f"minus {entropy}"
        return f"what {entropy} lacks of ln {self.spread:g}"

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer."""
        return global_entropy(outcome.scored.scores, self._valid(outcome), self.spread)


class MutualInformationLoss(AuxiliaryLoss):
    """-I(id; expert): each id few experts, all ids together all (Mod-Squad, Chen et al. 2023)."""

    kind: Literal["mutual_information"] = "mutual_information"
    id: IdName = Field(
        description="name of the ids that forward is given, e.g. task", examples=["task"]
    )
    count: int = Field(ge=1, le=10**6, description="how many ids there are", examples=[3])

    def what(self, setting: Setting) -> str:
        """Of which ids."""
        return f"minus the mutual information of {self.count:,} {named(self.id)}s and experts"

    def ids(self) -> tuple[str, ...]:
        """The one it is named after."""
        return (self.id,)

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer's gates."""
        routed, site = outcome.routed, outcome.scored.site
        gates = dense_gates(routed.weights, routed.choices, outcome.moe.num_choices)
        return mutual_information(gates, site.ids[self.id], self.count, site.valid)
