"""What becomes of choices after the first: taken always, never, by chance or above a threshold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.second import skip_choices
from moegen.spec.element import Element, Path

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

    def rules(self) -> Iterator[tuple[Path, str]]:
        """There is something that takes up a slot."""
        if self.takes_slot and not self.skips:
            yield ("takes_slot",), "no choice is skipped, so takes_slot has no use"

    @property
    def draws(self) -> bool:
        """Whether second experts are sampled."""
        return "sampling" in (self.policy, self.eval_policy)

    @property
    def skips(self) -> bool:
        """Whether anything may be skipped."""
        return bool({self.policy, self.eval_policy} - {"all", "sampling"})

    def says(self, setting: Setting) -> Iterator[str]:
        """What becomes of them, in training and else."""
        fate = setting.either(self._fate(self.policy), self._fate(self.eval_policy))
        which = "second choices" if setting.chosen == 2 else "choices after the first"
        yield f"Of {which}: {fate}."
        if self.skips and setting.mixture.capacity:
            slots = "takes up a slot all the same" if self.takes_slot else "takes up no slot"
            yield f"One that is skipped {slots}."

    def _fate(self, policy: Policy) -> str:
        """What becomes of a choice under a policy."""
        return {
            "all": "all are taken",
            "none": "none is taken",
            "threshold": f"those with a weight above {self.threshold:g} are taken",
            "random": f"each is taken with probability weight / {self.threshold:g}, at most 1",
            "sampling": "the expert is drawn by the softmax of the others' logits",
        }[policy]

    def kept(self, b: Builder, experts: Any, weights: Any, nowhere: int) -> Any:
        """experts [T, k], `nowhere` where a choice after the first is skipped."""
        policies = (self.policy, self.eval_policy)
        return skip_choices(experts, weights, policies, self.threshold, nowhere, b.training)
