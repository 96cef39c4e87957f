"""Tokens choose their experts: top-k and its relatives, capacity, and the way to rows."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from moegen.arch.routing.routed import Mixture, Routed, Scored
from moegen.arch.routing.second import SecondChoices
from moegen.arch.routing.select import Selection
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.experts import combine, gather_rows
from moegen.ops.routing import (
    balanced_or_best,
    expert_load,
    sort_by_expert,
    top_k,
    weight_of_free,
)
from moegen.ops.second import sample_second
from moegen.spec.element import Path


class TokenChoice(Selection):
    """Every token names its experts, best first; then capacity may refuse some."""

    def choose(self, b: Builder, moe: Mixture, scored: Scored) -> Any:
        """Experts [T, k] of every token."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def wanted(self, b: Builder, moe: Mixture, scored: Scored, experts: Any, weights: Any) -> Any:
        """Choices [T, k] that are made after all, `num_choices` in place of the others."""
        return experts

    def granted(self, b: Builder, moe: Mixture, experts: Any, weights: Any) -> Any:
        """Of the choices [T, k] that capacity let pass those that count."""
        return experts

    def active(self, moe: Mixture) -> Fraction:
        """k of all that can be chosen."""
        chosen = self.chosen(moe.granularity, moe.num_choices)
        return Fraction(chosen, moe.num_choices)

    def check(self, experts: int, granularity: int) -> Iterator[tuple[Path, str]]:
        """No more choices than experts."""
        chosen = self.chosen(granularity, experts)
        if chosen > experts:
            fine = f" (k {chosen // granularity} times granularity {granularity})"
            fine = fine if granularity > 1 else ""
            yield ("k",), f"k is {chosen}{fine} but there are only {experts} experts"

    def route(self, b: Builder, moe: Mixture, scored: Scored) -> Routed:
        """Choose, weigh, refuse what is beyond capacity, and sort by expert."""
        nowhere = moe.num_choices
        experts = self.choose(b, moe, scored)
        choices = experts
        gate, path = moe.router.gate, (*moe.at, "router", "gate")
        refuses = scored.valid is not None and moe.capacity is not None
        rerouted = refuses and moe.capacity.overflow == "next"  # type: ignore[union-attr]
        load, dropped = None, None
        if rerouted:
            load = self._load(moe, scored, choices)
            kept, dropped = self._rerouted(b, moe, scored, load)
            known = kept.clamp(max=nowhere - 1)
            weights = b.inline(gate, "weights", scored, known, path=path)
        else:
            weights = b.inline(gate, "weights", scored, experts, path=path)
            wanted = self.wanted(b, moe, scored, experts, weights)
            if scored.valid is not None:
                load = self._load(moe, scored, wanted)
                dropped = torch.zeros((), device=load.device)
            kept = wanted
            if refuses:
                kept, dropped = self._within_capacity(b, moe, scored, wanted, weights, load)
            kept = self.granted(b, moe, kept, weights)
        if gate.normalize == "sum" and gate.after_drop:
            weights = b.inline(gate, "over_kept", weights, kept, nowhere, path=path)
        return self._dispatched(b, moe, scored, choices, kept, weights, load, dropped)

    def _load(self, moe: Mixture, scored: Scored, experts: Any) -> Any:
        """Choices of real tokens for each expert, those inside experts counted apart."""
        spread = scored.site.spread
        if spread is None:
            return expert_load(experts, moe.num_choices, scored.valid)
        leaves = spread(experts)
        return expert_load(leaves, moe.total_experts, scored.valid)

    def _rerouted(self, b: Builder, moe: Mixture, scored: Scored, load: Any) -> tuple[Any, Any]:
        assert moe.capacity is not None
        path = ("capacity",)
        return b.inline(  # type: ignore[no-any-return]
            moe.capacity, "rerouted", scored, moe.num_experts, load, path=path
        )

    def _within_capacity(
        self, b: Builder, moe: Mixture, scored: Scored, experts: Any, weights: Any, load: Any
    ) -> tuple[Any, Any]:
        """Choices with those of padding and those beyond capacity sent to no expert."""
        assert moe.capacity is not None
        path = ("capacity",)
        return b.inline(  # type: ignore[no-any-return]
            moe.capacity, "admitted", moe, scored, experts, weights, load, path=path
        )

    def _dispatched(
        self,
        b: Builder,
        moe: Mixture,
        scored: Scored,
        choices: Any,
        kept: Any,
        weights: Any,
        load: Any,
        dropped: Any,
    ) -> Routed:
        through = self._through(moe, scored, choices, kept, weights)
        spread = scored.site.spread
        experts, total = kept, moe.num_experts
        if spread is not None:
            experts, total = spread(kept), moe.total_experts
        order, ends = sort_by_expert(experts, total)
        taken = kept < moe.num_experts
        if scored.valid is not None:
            taken = taken & scored.valid.unsqueeze(-1)

        def row_weights() -> Any:
            outer = weights.masked_fill(~taken, 0).flatten()[order]
            return outer

        def row_valid() -> Any:
            real = taken.flatten()[order]
            return real

        def rows(tokens: Any) -> Any:
            gathered = gather_rows(tokens, order)
            if moe.router.gate.scales == "output":
                return gathered
            return gathered * in_compute(b, weights).flatten()[order].unsqueeze(-1)

        def restore(outputs: Any) -> Any:
            output = moe.router.gate.scales == "output"
            return combine(outputs, order, weights if output else weights.new_ones(weights.shape))

        return Routed(
            rows=rows,
            ends=ends,
            restore=restore,
            load=load,
            dropped=dropped,
            choices=choices,
            kept=kept,
            weights=weights,
            through=through,
            row_weights=row_weights,
            row_valid=row_valid,
        )

    def _through(self, moe: Mixture, scored: Scored, choices: Any, kept: Any, weights: Any) -> Any:
        """How much of a token itself its output holds, [T] or None."""
        gate, capacity = moe.router.gate, moe.capacity
        if gate.blend:
            refusing = kept is not choices
            given = weights.masked_fill(kept >= moe.num_experts, 0) if refusing else weights
            return 1 - given.sum(-1)
        refused = capacity is not None and capacity.overflow == "input"
        identity = moe.num_choices - moe.num_experts
        if refused and scored.valid is not None:
            return weight_of_free(weights, kept, moe.num_experts, moe.num_choices + 1)
        if identity:
            last = moe.num_experts + moe.num_identity
            return weight_of_free(weights, kept, moe.num_experts, last)
        return None


def in_compute(b: Builder, weights: Any) -> Any:
    """Weights in the format that tokens are in."""
    precision = b.spec.precision
    same = precision.router_dtype == precision.compute_dtype
    return weights if same else weights.to(precision.compute_dtype)


class TopK(TokenChoice):
    """Every token takes the k experts of the highest scores; ties go to the lowest index."""

    shorthand = "k"

    kind: Literal["top_k"] = "top_k"
    takes_capacity: ClassVar[bool] = True
    takes_groups: ClassVar[tuple[str, ...]] = ("batch", "sequence", "run")
    k: int = Field(2, ge=1, le=10**6, description="experts a token takes, before granularity")
    second: SecondChoices | None = Field(
        None, description="what becomes of choices after the first; null: all are taken"
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """There is something to be done with second choices."""
        if self.second and self.k == 1:
            yield ("second",), "k is 1, so there are no second choices"
        if self.second and self.second.draws and self.k != 2:
            yield ("second",), f"sampling draws one second expert, but k is {self.k}"

    def says(self, setting: Setting) -> Iterator[str]:
        """How many of how many, by what, and what becomes of choices after the first."""
        router = setting.router
        by = setting.ranked
        of = f"of {setting.experts}"
        of += " that it may choose from" if router.restrict else ""
        if not router.score.learned:
            yield f"Each token takes the one expert that is named for it, {of}."
        elif setting.chosen == 1:
            yield f"Each token takes the one with the highest {by.removesuffix('s')} {of}."
        else:
            yield f"Each token takes the {setting.chosen:,} with the highest {by} {of}."
        if setting.mixture.granularity > 1:
            yield f"That is k = {self.k:,} times the granularity, {setting.mixture.granularity:,}."
        if self.second:
            yield from self.second.says(setting)

    def chosen(self, granularity: int, experts: int) -> int:
        """k, times the granularity."""
        return self.k * granularity

    def wanted(self, b: Builder, moe: Mixture, scored: Scored, experts: Any, weights: Any) -> Any:
        """Without second choices that are skipped, unless these take up room."""
        if self.second is None or self.second.takes_slot:
            return experts
        return self._without_skipped(b, moe, experts, weights)

    def granted(self, b: Builder, moe: Mixture, experts: Any, weights: Any) -> Any:
        """Without second choices that are skipped after they took up room."""
        if self.second is None or not self.second.takes_slot:
            return experts
        return self._without_skipped(b, moe, experts, weights)

    def _without_skipped(self, b: Builder, moe: Mixture, experts: Any, weights: Any) -> Any:
        assert self.second is not None
        if not self.second.skips:
            return experts
        path = (*moe.at, "router", "select", "second")
        return b.inline(self.second, "kept", experts, weights, moe.num_choices, path=path)

    def choose(self, b: Builder, moe: Mixture, scored: Scored) -> Any:
        """The best, or the best and one that is drawn."""
        chosen = self.chosen(moe.granularity, moe.num_choices)
        experts = top_k(scored.ranked, chosen)
        if self.second and self.second.draws:
            policies = (self.second.policy, self.second.eval_policy)
            experts = sample_second(scored.ranked, scored.logits, experts, policies, b.training)
        return experts


class AllExperts(TokenChoice):
    """Every token meets every expert: the dense mixture that all began with (Jacobs 1991)."""

    kind: Literal["all"] = "all"
    even_loads: ClassVar[bool] = True

    def says(self, setting: Setting) -> Iterator[str]:
        """All."""
        yield f"Each token takes all {setting.experts}."

    def chosen(self, granularity: int, experts: int) -> int:
        """All there are."""
        return experts

    def choose(self, b: Builder, moe: Mixture, scored: Scored) -> Any:
        """Their numbers, for each token."""
        every = torch.arange(moe.num_choices, device=scored.tokens.device)
        return every.expand(scored.tokens.shape[0], -1)


class Balanced(TokenChoice):
    """In training the assignment of one expert to each token that is best for all, loads equal.

    BASE layers (Lewis et al. 2021, arXiv:2103.16716): best is the highest sum of logits. In
    evaluation each token takes its best expert. A token's expert depends on all tokens of the
    batch, so training is not causal.
    """

    kind: Literal["balanced"] = "balanced"
    causal: ClassVar[bool] = False
    even_loads: ClassVar[bool] = True
    by_logits: ClassVar[bool] = True

    def says(self, setting: Setting) -> Iterator[str]:
        """Which assignment is best."""
        yield (
            f"In training {setting.competing} are spread evenly over {setting.experts}, one each, "
            f"so that the sum of their {setting.ranked} is the highest there is."
        )
        yield f"In {setting.afterwards} each token takes the one with the highest."

    def chosen(self, granularity: int, experts: int) -> int:
        """One."""
        return 1

    def choose(self, b: Builder, moe: Mixture, scored: Scored) -> Any:
        """Assigned in training, the best in evaluation."""
        if scored.valid is None:
            return top_k(scored.ranked, 1)
        return balanced_or_best(scored.ranked, scored.valid, b.training)
