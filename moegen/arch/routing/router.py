"""The router: noise, score, affinity, restriction, selection and gate, in a token's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from moegen.arch.routing.affinity import Affinity, Softmax
from moegen.arch.routing.gate import Gate
from moegen.arch.routing.noise import Noise
from moegen.arch.routing.restrict import Restriction
from moegen.arch.routing.routed import Scored
from moegen.arch.routing.score import LinearScore, Score
from moegen.arch.routing.select import Selection, TopK
from moegen.graph.builder import Builder
from moegen.spec.element import Element, OneOf

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


class BalanceBias(Element):
    """A bias on scores, for selection only, moved towards even load without a loss.

    After a step: bias += rate * sign(mean load - load) (DeepSeek-V3, arXiv:2408.15664).
    """

    shorthand = "rate"

    rate: float = Field(0.001, ge=0, le=1, description="how far the bias moves in a step")


class Router(Element):
    """How tokens find experts. Each part is a choice of its own."""

    score: Annotated[Score, OneOf(Score)] = Field(
        LinearScore(), description="logits of experts for tokens"
    )
    affinity: Annotated[Affinity, OneOf(Affinity)] = Field(
        Softmax(), description="scores from logits"
    )
    noise: Annotated[Noise | None, OneOf(Noise, optional=True)] = Field(
        None, description="exploration in training"
    )
    balance_bias: BalanceBias | None = Field(
        None, description="bias for selection, balanced without a loss"
    )
    restrict: Annotated[Restriction | None, OneOf(Restriction, optional=True)] = Field(
        None, description="which experts a token may choose from"
    )
    select: Annotated[Selection, OneOf(Selection)] = Field(TopK(), description="who chooses whom")
    gate: Gate = Field(Gate(), description="weights of the chosen experts")

    def scored(self, b: Builder, moe: MoE, tokens: Any, valid: Any, shape: Any) -> Scored:
        """Logits and scores of tokens [T, d]."""
        seen = tokens
        noise = self.noise if valid is not None else None
        if noise:
            seen = b.inline(noise, "on_input", seen, path=("router", "noise"))
        logits = b.inline(self.score, "logits", seen, moe.num_experts, path=("router", "score"))
        if noise:
            logits = b.inline(noise, "on_logits", logits, path=("router", "noise"))
        scores = b.inline(self.affinity, "scores", logits, path=("router", "affinity"))
        return Scored(tokens, logits, scores, valid, shape)

    def ranked(self, b: Builder, moe: MoE, scored: Scored) -> Any:
        """What selection goes by: scores, biased, minus infinity where forbidden."""
        ranked = scored.scores
        if self.balance_bias:
            ranked = ranked + self.bias(b, moe)
        if self.restrict:
            ranked = b.inline(self.restrict, "allowed", ranked, path=("router", "restrict"))
        return ranked

    def bias(self, b: Builder, moe: MoE) -> Any:
        """The balance bias, a buffer [E] that checkpoints hold."""
        size = (moe.num_experts,)
        return b.buffer("balance_bias", *size, make=torch.zeros, persistent=True, size=size)
