"""A selection of one's own: top-k, less the experts that a token's best one outweighs by far.

Nothing else is needed to use it: importing this file registers the kind `confident`, in Python by
`import examples.confident`, for the command by `moegen --import examples/confident.py build ...`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from moegen.arch.routing.routed import Mixture, Scored
from moegen.arch.routing.token_choice import TokenChoice
from moegen.graph.builder import Builder
from moegen.ops.op import op
from moegen.ops.routing import top_k


@op(flops=lambda experts, scores, share, nowhere: 0)
def drop_weak(experts: Tensor, scores: Tensor, share: float, nowhere: int) -> Tensor:
    """Choices [T, k], best first; `nowhere` for those that score less than share of the best."""
    chosen = scores.gather(-1, experts)
    return experts.masked_fill(chosen < share * chosen[:, :1], nowhere)


class Confident(TokenChoice):
    """Up to k experts a token: those that score at least `share` of what its best one does."""

    kind: Literal["confident"] = "confident"
    takes_capacity: ClassVar[bool] = True
    k: int = Field(2, ge=1, le=10**6, description="experts a token takes at most")
    share: float = Field(0.5, ge=0, le=1, description="of the best score, needed to be taken")

    def chosen(self, granularity: int, experts: int) -> int:
        """k, times the granularity."""
        return self.k * granularity

    def choose(self, b: Builder, moe: Mixture, scored: Scored) -> Any:
        """The best k."""
        return top_k(scored.ranked, self.chosen(moe.granularity, moe.num_choices))

    def wanted(self, b: Builder, moe: Mixture, scored: Scored, experts: Any, weights: Any) -> Any:
        """Of these the ones that are not weak."""
        return drop_weak(experts, scored.scores, self.share, moe.num_choices)
