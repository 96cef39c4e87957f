"""Selection: which tokens meet which experts."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from moegen.arch.routing.routed import Routed, Scored
from moegen.graph.builder import Builder
from moegen.ops.attention import at_most
from moegen.ops.capacity import expert_capacity
from moegen.ops.experts import combine, combine_rows, gather_rows
from moegen.ops.losses import masked_mean
from moegen.ops.routing import expert_load, position_in_expert, sort_by_expert, top_k
from moegen.spec.element import Kinds, Path

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


class Selection(Kinds):
    """Makes the assignment of tokens to experts from their scores."""

    default_kind: ClassVar[str | None] = "top_k"
    causal: ClassVar[bool] = True
    takes_capacity: ClassVar[bool] = False

    def route(self, b: Builder, moe: MoE, scored: Scored) -> Routed:
        """Rows for the experts, and the way back."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def active(self, moe: MoE) -> Fraction:
        """The fraction of the experts that a token meets, on average."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def chosen(self, granularity: int) -> int:
        """Experts that a token chooses; 0 where experts choose."""
        return 0

    def check(self, experts: int, granularity: int) -> Iterator[tuple[Path, str]]:
        """Rules that need the number of experts."""
        yield from ()


class TopK(Selection):
    """Every token takes the k experts of the highest scores; ties go to the lowest index."""

    shorthand = "k"

    kind: Literal["top_k"] = "top_k"
    takes_capacity: ClassVar[bool] = True
    k: int = Field(2, ge=1, le=10**6, description="experts a token takes, before granularity")

    def chosen(self, granularity: int) -> int:
        """k, times the granularity."""
        return self.k * granularity

    def active(self, moe: MoE) -> Fraction:
        """k of E."""
        return Fraction(self.chosen(moe.granularity), moe.num_experts)

    def check(self, experts: int, granularity: int) -> Iterator[tuple[Path, str]]:
        """No more choices than experts."""
        chosen = self.chosen(granularity)
        if chosen > experts:
            fine = f" (k {self.k} times granularity {granularity})" if granularity > 1 else ""
            yield ("k",), f"k is {chosen}{fine} but there are only {experts} experts"

    def route(self, b: Builder, moe: MoE, scored: Scored) -> Routed:
        """Choose, weigh, refuse what is beyond capacity, and sort by expert."""
        chosen = self.chosen(moe.granularity)
        ranked = moe.router.ranked(b, moe, scored)
        experts = top_k(ranked, chosen)
        gate, path = moe.router.gate, ("router", "gate")
        weights = b.inline(gate, "weights", scored.logits, scored.scores, experts, path=path)
        choices, load, dropped = experts, None, None
        if scored.valid is not None:
            load = expert_load(experts, moe.num_experts, scored.valid)
            dropped = torch.zeros((), device=load.device)
            if moe.capacity:
                experts, dropped = self._within_capacity(b, moe, scored, experts, load)
        order, ends = sort_by_expert(experts, moe.num_experts)
        return Routed(
            rows=lambda tokens: gather_rows(tokens, order),
            ends=ends,
            restore=lambda rows: combine(rows, order, weights),
            choices=choices,
            load=load,
            dropped=dropped,
        )

    def _within_capacity(
        self, b: Builder, moe: MoE, scored: Scored, experts: Any, load: Any
    ) -> tuple[Any, Any]:
        """Choices with those of padding and those beyond capacity sent to no expert."""
        nowhere = moe.num_experts
        experts = experts.masked_fill(~scored.valid.unsqueeze(-1), nowhere)
        assert moe.capacity is not None
        chosen, path = self.chosen(moe.granularity), ("capacity",)
        slots = b.inline(moe.capacity, "slots", scored.tokens, chosen, nowhere, path=path)
        position = position_in_expert(experts, nowhere)
        experts = experts.masked_fill(position >= slots, nowhere)
        kept = (experts < nowhere).sum()
        dropped = 1 - kept / load.sum().clamp(min=1)
        return experts, dropped


class ExpertChoice(Selection):
    """Every expert takes its best tokens, so loads are equal by construction.

    Zhou et al. 2022 (arXiv:2202.09368). Whether a token is taken depends on tokens after it,
    so it is not causal.
    """

    shorthand = "factor"

    kind: Literal["expert_choice"] = "expert_choice"
    causal: ClassVar[bool] = False
    factor: float = Field(2.0, gt=0, le=10**6, description="experts a token meets on average")

    def active(self, moe: MoE) -> Fraction:
        """As many of E as the capacity factor says, on average."""
        share = Fraction(str(self.factor)) * moe.granularity / moe.num_experts
        return min(share, Fraction(1))

    def check(self, experts: int, granularity: int) -> Iterator[tuple[Path, str]]:
        """No expert can take more than all tokens."""
        if self.factor * granularity > experts:
            yield ("factor",), f"factor is {self.factor} but there are only {experts} experts"

    def route(self, b: Builder, moe: MoE, scored: Scored) -> Routed:
        """Each expert's best tokens; padding is taken last and weighs nothing."""
        experts = moe.num_experts
        size = scored.tokens.shape[0]
        slots = expert_capacity(size, experts, self.factor * moe.granularity, minimum=1)
        slots = at_most(slots, size)
        scores = moe.router.ranked(b, moe, scored).transpose(0, 1)
        if scored.valid is not None:
            scores = scores.masked_fill(~scored.valid, 0)
        best = top_k(scores, slots)
        weights = scores.gather(-1, best).flatten()
        tokens = best.flatten()
        load, dropped = None, None
        if scored.valid is not None:
            load = scored.valid[best].sum(-1)
            taken = torch.zeros_like(scored.valid).index_fill(0, tokens, True)
            dropped = masked_mean(~taken, scored.valid)
        ends = torch.arange(1, experts + 1, dtype=torch.int32, device=tokens.device) * slots
        return Routed(
            rows=lambda x: x[tokens],
            ends=ends,
            restore=lambda rows: combine_rows(rows, tokens, weights, size),
            choices=None,
            load=load,
            dropped=dropped,
        )
