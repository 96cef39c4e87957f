"""Soft mixtures: experts compute on averages of tokens, and nothing is chosen or dropped."""

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
from moegen.ops.sequences import softmax_over_tokens
from moegen.spec.words import article, counted


class Soft(Selection):
    """Each slot of an expert is an average of a sequence's tokens, each output one of slots.

    Soft MoE (Puigcerver et al. 2024, arXiv:2308.00951). Every output depends on all tokens of its
    sequence, so it is not causal.
    """

    shorthand = "slots"

    kind: Literal["soft"] = "soft"
    causal: ClassVar[bool] = False
    tokens_choose: ClassVar[bool] = False
    even_loads: ClassVar[bool] = True
    takes_groups: ClassVar[tuple[str, ...]] = ("sequence",)
    slots: int = Field(1, ge=1, le=10**6, description="slots of each expert for a sequence")

    def says(self, setting: Setting) -> Iterator[str]:
        """Both averages."""
        slots = counted(self.slots, "slot")
        yield f"Each of {setting.experts} has {slots} for {article(setting.whole)}."
        yield (
            f"A slot holds the average of all tokens of the {setting.whole}, weighted by a softmax "
            "of its logits over them."
        )
        yield (
            f"A token's output is the average of all {setting.logits}' outputs, weighted by the "
            "token's scores."
        )
        yield "Nothing is chosen and nothing is refused; padding has no weight."

    def logits(self, experts: int) -> int:
        """One for each slot."""
        return experts * self.slots

    def active(self, moe: Mixture) -> Fraction:
        """Every token has a share in every slot, of every expert."""
        return Fraction(1)

    def route(self, b: Builder, moe: Mixture, scored: Scored) -> Routed:
        """Slots are averages by softmax over tokens, outputs by softmax over slots."""
        site, experts = scored.site, moe.num_experts
        batch, length = site.sequences
        precision = b.spec.precision
        dispatch = softmax_over_tokens(scored.logits, site.valid, length)
        shares = scored.scores
        if precision.router_dtype != precision.compute_dtype:
            dispatch = dispatch.to(precision.compute_dtype)
        if precision.router_dtype != precision.expert_dtype:
            shares = shares.to(precision.expert_dtype)
        of_slots = torch.unflatten(dispatch, 0, (batch, length))
        of_tokens = torch.unflatten(shares, 0, (batch, length))
        load, dropped = None, None
        if site.valid is not None:
            held = torch.ones(experts, dtype=torch.int64, device=dispatch.device)
            load = held * (batch * self.slots)
            dropped = torch.zeros((), device=dispatch.device)
        counts = torch.arange(1, experts + 1, dtype=torch.int32, device=dispatch.device)
        ends = counts * (batch * self.slots)

        def rows(tokens: Any) -> Any:
            sequences = tokens.unflatten(0, (batch, length))
            slots = of_slots.transpose(1, 2) @ sequences  # [B, E * slots, d]
            by_expert = slots.unflatten(1, (experts, self.slots)).transpose(0, 1)
            return by_expert.flatten(0, 2)

        def restore(rows: Any) -> Any:
            by_expert = rows.unflatten(0, (experts, batch, self.slots))
            slots = by_expert.transpose(0, 1).flatten(1, 2)
            return (of_tokens @ slots).flatten(0, 1)

        return Routed(rows=rows, ends=ends, restore=restore, load=load, dropped=dropped)
