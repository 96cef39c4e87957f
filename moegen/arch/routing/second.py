"""What becomes of choices after the first: taken always, never, by chance or above a threshold."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moegen.graph.builder import Builder
from moegen.ops.second import skip_choices
from moegen.spec.element import Element

Policy = Literal["all", "none", "threshold", "random", "sampling"]


class SecondChoices(Element):
    """Whether a token takes its second expert, and any after that (GShard 2020, Mesh-TF, fairseq).

    all: yes. none: no, though the first one's gate still leaves room for it. threshold: if its
    gate is above the threshold. random: with probability gate / threshold; 0.5 is GShard's rule.
    sampling: the second one is drawn by Gumbel noise among the others, and always taken.
    The gate is what the layer's gate section makes of it before anything is refused.
    """

    shorthand = "policy"

    policy: Policy = Field("all", description="in training")
    eval_policy: Policy = Field("all", description="in evaluation")
    threshold: float = Field(0.2, gt=0, le=1, description="of threshold and random")
    takes_slot: bool = Field(
        False, description="what is skipped fills capacity all the same (GShard's algorithm)"
    )

    @property
    def draws(self) -> bool:
        """Whether second experts are sampled."""
        return "sampling" in (self.policy, self.eval_policy)

    @property
    def skips(self) -> bool:
        """Whether anything may be skipped."""
        return bool({self.policy, self.eval_policy} - {"all", "sampling"})

    def kept(self, b: Builder, experts: Any, weights: Any, nowhere: int) -> Any:
        """experts [T, k], `nowhere` where a choice after the first is skipped."""
        policies = (self.policy, self.eval_policy)
        return skip_choices(experts, weights, policies, self.threshold, nowhere, b.training)
