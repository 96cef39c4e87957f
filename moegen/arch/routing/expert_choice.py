"""Experts choose their tokens, so loads are equal by construction."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from moegen.arch.routing.routed import Mixture, Routed, Scored
from moegen.arch.routing.select import Selection
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.attention import at_most
from moegen.ops.capacity import expert_capacity
from moegen.ops.experts import combine_rows
from moegen.ops.losses import masked_mean
from moegen.ops.routing import best_tokens, shares_of_token
from moegen.spec.element import Path


class ExpertChoice(Selection):
    """Every expert takes its best tokens (Zhou et al. 2022, arXiv:2202.09368).

    Whether a token is taken depends on tokens after it, so it is not causal.
    """

    shorthand = "factor"

    kind: Literal["expert_choice"] = "expert_choice"
    causal: ClassVar[bool] = False
    tokens_choose: ClassVar[bool] = False
    even_loads: ClassVar[bool] = True
    takes_groups: ClassVar[tuple[str, ...]] = ("batch", "sequence")
    factor: float = Field(2.0, gt=0, le=10**6, description="experts a token meets on average")
    round_first: Literal["nothing", "share_down"] = Field(
        "nothing", description="what is rounded before the factor: tokens / experts (praxis)"
    )

    def active(self, moe: Mixture) -> Fraction:
        """As many of E as the capacity factor says, on average."""
        share = Fraction(str(self.factor)) * moe.granularity / moe.num_experts
        return min(share, Fraction(1))

    def check(self, experts: int, granularity: int) -> Iterator[tuple[Path, str]]:
        """No expert can take more than all tokens."""
        if self.factor * granularity > experts:
            yield ("factor",), f"factor is {self.factor} but there are only {experts} experts"

    def slots(self, moe: Mixture, group: Any) -> Any:
        """Tokens that each expert takes of a group, a whole number."""
        factor = self.factor * moe.granularity
        options: dict[str, Any] = {"minimum": 1}
        if self.round_first != "nothing":
            options["round_first"] = self.round_first
        slots = expert_capacity(group, moe.num_experts, factor, **options)
        slots = at_most(slots, group)
        return slots

    def says(self, setting: Setting) -> Iterator[str]:
        """How many each takes, and what that means for a token."""
        slots = self.slots(setting.mixture, setting.group)
        share = float(self.active(setting.mixture)) * setting.mixture.num_experts
        yield (
            f"Each of {setting.experts} takes, of {setting.competing}, the {slots:,} with the "
            "highest scores for it."
        )
        yield f"So a token meets {share:g} of them on average, and perhaps none."
        yield "Padding is taken last and adds nothing."

    def route(self, b: Builder, moe: Mixture, scored: Scored) -> Routed:
        """Each expert's best tokens; padding is taken last and weighs nothing."""
        experts, site = moe.num_experts, scored.site
        size = scored.tokens.shape[0]
        group = size if site.group is None else site.group
        slots = self.slots(moe, group)
        scores = scored.scores.transpose(0, 1)
        ranked = scored.ranked.transpose(0, 1)
        if scored.valid is not None:
            scores = scores.masked_fill(~scored.valid, 0)
            ranked = ranked.masked_fill(~scored.valid, float("-inf"))
        best = best_tokens(ranked, slots, group)
        weights = self._weights(moe, scores, best).flatten()
        tokens = best.flatten()
        load, dropped = None, None
        if scored.valid is not None:
            load = scored.valid[best].sum(-1)
            taken = torch.zeros_like(scored.valid).index_fill(0, tokens, True)
            dropped = masked_mean(~taken, scored.valid)
        counts = torch.arange(1, experts + 1, dtype=torch.int32, device=tokens.device)
        return Routed(
            rows=lambda x: x[tokens],
            ends=counts * best.shape[1],
            restore=lambda rows: combine_rows(rows, tokens, weights, size),
            load=load,
            dropped=dropped,
            row_weights=lambda: weights,
            row_valid=lambda: None if scored.valid is None else scored.valid[tokens],
        )

    def _weights(self, moe: Mixture, scores: Any, best: Any) -> Any:
        """Weights [E, slots] of the tokens that experts took."""
        gate = moe.router.gate
        weights = scores.gather(-1, best)
        if gate.normalize in ("count", "sum"):
            size = scores.shape[1]
            weights = shares_of_token(
                weights, best, size, gate.normalize == "count", gate.eps or 0.0
            )
        return weights * gate.scale if gate.scale != 1.0 else weights
