"""A selection of one's own: top-k, less the experts that a token's best one outweighs by far.

Nothing else is needed to use it: importing this file registers the kind `confident`, in Python by
`import examples.confident`, for the command by `moegen --import examples/confident.py build ...`.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from moegen.arch.routing.routed import Routed, Scored
from moegen.arch.routing.select import Selection
from moegen.graph.builder import Builder
from moegen.ops.experts import combine, gather_rows
from moegen.ops.op import op
from moegen.ops.routing import expert_load, sort_by_expert, top_k
from moegen.spec.element import Path

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


@op(flops=lambda experts, scores, share, nowhere: 0)
def drop_weak(experts: Tensor, scores: Tensor, share: float, nowhere: int) -> Tensor:
    """Choices [T, k], best first; `nowhere` for those that score less than share of the best."""
    chosen = scores.gather(-1, experts)
    return experts.masked_fill(chosen < share * chosen[:, :1], nowhere)


class Confident(Selection):
    """Up to k experts a token: those that score at least `share` of what its best one does."""

    kind: Literal["confident"] = "confident"
    k: int = Field(2, ge=1, le=10**6, description="experts a token takes at most")
    share: float = Field(0.5, ge=0, le=1, description="of the best score, needed to be taken")

    def chosen(self, granularity: int) -> int:
        """k, times the granularity."""
        return self.k * granularity

    def active(self, moe: MoE) -> Fraction:
        """At most k of E: what a token drops depends on the token."""
        return Fraction(self.chosen(moe.granularity), moe.num_experts)

    def check(self, experts: int, granularity: int) -> Iterator[tuple[Path, str]]:
        """No more choices than experts."""
        if self.chosen(granularity) > experts:
            yield ("k",), f"k is {self.chosen(granularity)} but there are only {experts} experts"

    def route(self, b: Builder, moe: MoE, scored: Scored) -> Routed:
        """Choose, weigh, drop what is weak, and sort by expert."""
        choices = top_k(moe.router.ranked(b, moe, scored), self.chosen(moe.granularity))
        weights = moe.router.gate.weights(b, scored.logits, scored.scores, choices)
        experts = drop_weak(choices, scored.scores, self.share, moe.num_experts)
        load, dropped = None, None
        if scored.valid is not None:
            load = expert_load(experts, moe.num_experts, scored.valid)
            dropped = torch.zeros((), device=load.device)
        order, ends = sort_by_expert(experts, moe.num_experts)
        return Routed(
            rows=lambda tokens: gather_rows(tokens, order),
            ends=ends,
            restore=lambda rows: combine(rows, order, weights),
            choices=choices,
            load=load,
            dropped=dropped,
        )
