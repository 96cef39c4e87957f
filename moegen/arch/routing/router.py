"""The router: input, noise, score, affinity, restriction, selection and gate, in this order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field

from moegen.arch.routing.affinity import Affinity, Softmax
from moegen.arch.routing.gate import Gate
from moegen.arch.routing.ids import IdName, named
from moegen.arch.routing.inputs import RouterInput, TokenInput
from moegen.arch.routing.noise import Noise
from moegen.arch.routing.restrict import Restriction
from moegen.arch.routing.routed import Scored, Site
from moegen.arch.routing.router_rules import of_parts
from moegen.arch.routing.score import LinearScore, Score
from moegen.arch.routing.select import Selection
from moegen.arch.routing.token_choice import TopK
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.spec.element import Element, OneOf, Path


class BalanceBias(Element):
    """A bias on scores, for selection only, moved towards even load without a loss.

    After a step: bias += rate * sign(mean load - load) (DeepSeek-V3, arXiv:2408.15664).
    """

    shorthand = "rate"

    rate: float = Field(0.001, ge=0, le=1, description="how far the bias moves in a step")

    def says(self, setting: Setting) -> Iterator[str]:
        """What it is added to, and how it moves."""
        yield f"A bias of each {setting.noun} is added to its score, for selection alone."
        if self.rate:
            yield (
                f"After a training step, update_balance moves it by {self.rate:g}: up where the "
                "load was below the mean, down where above."
            )
        else:
            yield "Its rate is 0, so it stays where it is."


class Gates(Element):
    """Router weights of their own for each id, such as a task (MMoE 2018, Mod-Squad 2023)."""

    id: IdName = Field(
        description="name of the ids that forward is given, e.g. task", examples=["task"]
    )
    count: int = Field(
        ge=1, le=10**6, description="how many ids, so how many gates, there are", examples=[3]
    )

    def says(self, setting: Setting) -> Iterator[str]:
        """Whose weights they are."""
        yield f"Each {named(self.id)} has router weights of its own, {self.count:,} sets in all."


class Router(Element):
    """How tokens find experts. Each part is a choice of its own."""

    input: Annotated[RouterInput, OneOf(RouterInput)] = Field(
        TokenInput(), description="what is scored: the token, its sentence, or an id"
    )
    gates: Gates | None = Field(None, description="one set of router weights for each id")
    score: Annotated[Score, OneOf(Score)] = Field(
        LinearScore(), description="logits of experts for tokens"
    )
    noise: Annotated[Noise | None, OneOf(Noise, optional=True)] = Field(
        None, description="exploration in training"
    )
    affinity: Annotated[Affinity, OneOf(Affinity)] = Field(
        Softmax(), description="scores from logits"
    )
    balance_bias: BalanceBias | None = Field(
        None, description="bias for selection, balanced without a loss"
    )
    restrict: Annotated[Restriction | None, OneOf(Restriction, optional=True)] = Field(
        None, description="which experts a token may choose from"
    )
    select: Annotated[Selection, OneOf(Selection)] = Field(TopK(), description="who chooses whom")
    gate: Gate = Field(Gate(), description="weights of the chosen experts")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What parts need of each other."""
        score, select, gate = self.score, self.select, self.gate
        if self.gates and not score.per_site:
            yield ("gates",), f"gates are for a linear score, not {score.kind}"
        if not score.learned:
            for name in ("noise", "balance_bias", "gates"):
                if getattr(self, name):
                    yield (name,), f"a {score.kind} leaves nothing to choose, so {name} has no use"
            if not select.tokens_choose or select.chosen(1, 2) > 1:
                yield ("select",), f"a {score.kind} names one expert a token; select top_k with k 1"
        if gate.normalize == "softmax_over_kept" and not self.affinity.sums_to_one:
            sentence = f"softmax_over_kept leaves no use for affinity {self.affinity.kind}"
            yield ("gate",), sentence
        yield from self._side()
        yield from of_parts(self)

    def _side(self) -> Iterator[tuple[Path, str]]:
        """What belongs to tokens that choose, and what to experts that do."""
        kind, gate = self.select.kind, self.gate
        if self.select.tokens_choose:
            if gate.normalize == "count":
                yield ("gate",), f"count is for experts that choose, not for {kind}"
            if self.affinity.kind == "softmax_over_tokens":
                yield ("affinity",), f"softmax_over_tokens is for experts that choose, not {kind}"
            return
        if gate.normalize not in ("none", "count", "sum"):
            yield ("gate",), f"under {kind} gates are the scores, so not {gate.normalize}"
        for name in ("after_drop", "blend"):
            if getattr(gate, name):
                yield ("gate", name), f"{name} is for tokens that choose, not for {kind}"
        if gate.scales == "input":
            yield ("gate", "scales"), f"weights scale inputs of tokens that choose, not of {kind}"
        if gate.power != 1.0:
            yield ("gate", "power"), f"power is for tokens that choose, not for {kind}"
        names = ["balance_bias", "restrict"]
        if kind == "soft":
            if self.noise and self.noise.selection_only:
                yield ("noise",), "soft selects nothing, so noise for selection only has no use"
            if gate != Gate():
                yield ("gate",), "soft weighs slots by a softmax of their own"
            if self.affinity.kind != "softmax":
                yield ("affinity",), "soft weighs slots by a softmax"
        for name in names:
            if getattr(self, name):
                yield (name,), f"{name} is for tokens that choose, not for {kind}"

    def parts(self) -> Iterator[tuple[str, Element]]:
        """The parts it has by name, in a token's order."""
        for name in type(self).model_fields:
            if isinstance(part := getattr(self, name), Element):
                yield name, part

    def ids(self) -> tuple[str, ...]:
        """Names of the ids that its parts read, each once."""
        names = [*self.input.ids(), *self.score.ids()]
        names += [self.gates.id] if self.gates else []
        names += self.restrict.ids() if self.restrict else ()
        return tuple(dict.fromkeys(names))

    def scored(self, b: Builder, tokens: Any, site: Site, at: Path = ()) -> Scored:
        """Logits and scores of tokens [T, d], for a router at a place below the layer's."""
        at = (*at, "router")
        noise = self.noise if site.valid is not None else None
        seen = b.inline(self.input, "seen", tokens, site, path=(*at, "input"))
        if noise:
            seen = b.inline(noise, "on_input", seen, path=(*at, "noise"))
        clean = b.inline(self.score, "logits", seen, site, path=(*at, "score"))
        if self.restrict and self.restrict.on_logits:
            clean = self._allowed(b, clean, site)
        logits = noisy = clean
        deviation = None
        if noise:
            path = (*at, "noise")
            noisy, deviation = b.inline(noise, "on_logits", clean, seen, site, path=path)
            logits = clean if noise.selection_only else noisy
        scores = b.inline(self.affinity, "scores", logits, site, path=(*at, "affinity"))
        ranked = scores
        if self.select.by_logits:
            ranked = noisy
        elif noisy is not logits:
            ranked = b.inline(self.affinity, "scores", noisy, site, path=(*at, "affinity"))
        if self.balance_bias:
            ranked = ranked + self.bias(b, site.choices)
        sure = self.affinity.sums_to_one and ranked is scores
        if self.restrict:
            ranked = self._ranked(b, ranked, clean, site)
            sure = sure and self.restrict.on_logits
        return Scored(tokens, clean, logits, scores, ranked, deviation, site, sure)

    def bias(self, b: Builder, choices: int) -> Any:
        """The balance bias, a buffer [E] that checkpoints hold."""
        size = (choices,)
        return b.buffer("balance_bias", *size, make=torch.zeros, persistent=True, size=size)

    def _allowed(self, b: Builder, values: Any, site: Site) -> Any:
        assert self.restrict is not None
        return b.inline(self.restrict, "allowed", values, site, path=("router", "restrict"))

    def _ranked(self, b: Builder, ranked: Any, clean: Any, site: Site) -> Any:
        """Forbidden experts last; scores of forbidden logits are zero, which a bias could lift."""
        if self.restrict is None or not self.restrict.on_logits:
            return self._allowed(b, ranked, site)
        return ranked.masked_fill(clean == float("-inf"), float("-inf"))
