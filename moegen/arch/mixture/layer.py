"""One mixture on vectors: a gate, experts of one or several shapes, and their weighted sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from pydantic import Field

from moegen.arch.losses.auxiliary import Outcome
from moegen.arch.mixture.experts import VectorExperts
from moegen.arch.mixture.gating import Anneal, Gating, Stochastic, broken_loss
from moegen.arch.moe import Losses
from moegen.arch.routing.networks import TreeScore
from moegen.arch.routing.routed import Routed, Scored, Site
from moegen.arch.routing.sites import one_matrix
from moegen.graph.builder import Builder
from moegen.graph.layer import Layer
from moegen.ops.experts import combine, gather_rows
from moegen.ops.information import router_entropy
from moegen.ops.losses import masked_mean
from moegen.ops.mixtures import (
    annealing_plan,
    chosen_by_any,
    constrain_gates,
    first_choices,
    number,
    open_gates,
    sparsity,
)
from moegen.ops.routing import expert_load, sort_by_expert, top_k
from moegen.spec.element import Path
from moegen.spec.words import listed


class MixtureLayer(Layer):
    """A mixture of experts on vectors."""

    # What routers of tokens have beside, as selection asks for it.
    capacity: ClassVar[None] = None
    granularity: ClassVar[int] = 1
    num_identity: ClassVar[int] = 0
    at: ClassVar[Path] = ()

    experts: VectorExperts = Field(description="the experts")
    others: tuple[VectorExperts, ...] = Field(
        (), description="more experts, of other shapes; their numbers come after the first ones'"
    )
    width: int | None = Field(
        None, ge=1, le=10**7, description="numbers of an output; of the last layer the target's"
    )
    router: Gating = Field(Gating(), description="how examples find experts")
    patches: int | None = Field(
        None, ge=1, le=10**6, description="an example is so many vectors: the router sees their "
        "sum, experts each of them, and their outputs are summed"
    )  # fmt: skip
    margin: float | None = Field(
        None, ge=0, le=1e9, description="in training an expert is left out whose gates so far "
        "exceed the mean of all experts' by more than this (Eigen et al. 2013)"
    )  # fmt: skip
    anneal: Anneal | None = Field(
        None, description="begin with more experts an example (Ramachandran and Le 2019)"
    )
    stochastic: Stochastic | None = Field(
        None, description="experts open by chance, each by itself (Bengio et al. 2013)"
    )
    losses: Losses = Field({}, description="auxiliary losses: balance, importance, load, z")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What a router of examples can be, and what its parts need of each other."""
        router = self.router
        for name in ("input", "gates", "balance_bias", "restrict"):
            if getattr(router, name) != type(router).model_fields[name].default:
                yield ("router", name), f"{name} is for routers of tokens; leave it out"
        kind = router.select.kind
        if kind not in ("all", "top_k"):
            yield ("router", "select"), f"{kind} is for tokens; select all, or so many experts"
        if not router.score.learned:
            yield ("router", "score"), f"{router.score.kind} is by token id; use linear"
        if router.gate.blend or router.gate.after_drop:
            name = "blend" if router.gate.blend else "after_drop"
            yield ("router", "gate", name), f"{name} is for routers of tokens; leave it out"
        for path, sentence in router.select.check(self.num_experts, 1):
            yield ("router", "select", *path), sentence
        if self.dense and router.gate.normalize not in ("none", "constant"):
            sentence = "all experts' scores sum to one already; use none, or constant"
            yield ("router", "gate"), sentence
        if isinstance(router.score, TreeScore) and router.score.leaves != self.num_experts:
            sentence = f"the tree has {router.score.leaves} leaves for {self.num_experts} experts"
            yield ("router", "score", "branches"), sentence
        if self.stochastic and (kind != "all" or router.affinity.sums_to_one):
            sentence = "each expert opens by itself; say select: all and affinity: sigmoid"
            yield ("stochastic",), sentence
        if self.margin is not None and not self.dense:
            yield ("margin",), f"margin is for gates of all experts, not for {kind}"
        if self.anneal and not self.chosen < self.anneal.start <= self.num_experts:
            sentence = f"start is {self.anneal.start}, but must be above k, {self.chosen}, and"
            yield ("anneal", "start"), f"{sentence} at most the {self.num_experts} experts"
        if self.anneal and router.gate.normalize != "softmax_over_kept":
            sentence = "with anneal gates are the softmax of the chosen logits"
            yield ("anneal",), f"{sentence}; say gate: softmax_over_kept"
        for index, group in enumerate((self.experts, *self.others)):
            if group.signs and self.width not in (None, 1):
                at: Path = ("others", index - 1, "signs") if index else ("experts", "signs")
                yield at, f"signs give 1 number, but width is {self.width}"
        for name, loss in self.losses.items():
            yield from ((("losses", name, *path), text) for path, text in broken_loss(self, loss))

    # Facts: as selection, gates and losses ask for them

    @property
    def num_experts(self) -> int:
        """E: experts of all shapes."""
        return self.experts.count + sum(group.count for group in self.others)

    @property
    def num_choices(self) -> int:
        """What an example can choose: all of them."""
        return self.num_experts

    @property
    def total_experts(self) -> int:
        """Networks in all: none is inside another."""
        return self.num_experts

    @property
    def dense(self) -> bool:
        """Whether every example meets every expert."""
        return self.router.select.kind == "all" and self.stochastic is None

    @property
    def chosen(self) -> int:
        """k: experts that an example meets."""
        return int(self.router.select.chosen(1, self.num_experts))

    def loss_names(self, on: Any) -> list[str]:
        """Auxiliary losses that are on, as the spec's phase of training says."""
        names = [*self.losses, *(["sparsity"] if self.stochastic else [])]
        return [name for name in names if on == "all" or name in on]

    def describe(self, spec: Any) -> str:
        """`Mixture of 4 linear experts: all for every example.`"""
        groups = listed([g.describe() for g in (self.experts, *self.others)], "and")
        met = "all" if self.dense else f"{self.chosen}"
        return f"Mixture of {groups}: {met} for every example."

    def programs(self) -> tuple[str, ...]:
        """The sum, and, if all are there, the experts' outputs apart."""
        return ("forward", "apart") if self.dense else ("forward",)

    # Programs

    def forward(self, b: Builder, x: Any) -> Any:
        """x [B, d] to the weighted sum of the experts' outputs [B, n], and what routing did."""
        if self.dense:
            outputs, gates, routing = self._apart(b, x)
            with b.section("combine"):
                out = (gates.unsqueeze(1) @ outputs).squeeze(1)
            return out, routing
        with b.section("route"):
            scored = self._scored(b, x)
            path = ("router", "select")
            if self.stochastic:
                routed = self._opened(b, scored)
            elif self.anneal:
                routed = self._annealed(b, scored)
            else:
                routed = b.inline(self.router.select, "route", self, scored, path=path)
        out = self._sparse(b, x, routed)
        return out, self._routing(b, scored, routed)

    def apart(self, b: Builder, x: Any) -> Any:
        """x [B, d] to every expert's output [B, E, n], gates [B, E], and what routing did."""
        return self._apart(b, x)

    # Parts

    def _scored(self, b: Builder, x: Any) -> Scored:
        seen = x.sum(1) if self.patches else x
        valid = torch.ones(x.shape[:1], dtype=torch.bool, device=x.device)
        site = Site(
            choices=self.num_experts,
            valid=valid,
            sequences=(x.shape[0], 1),
            ids={},
            group=None,
            linear=one_matrix,
        )
        scored: Scored = b.inline(self.router, "scored", seen, site, path=("router",))
        return scored

    def _apart(self, b: Builder, x: Any) -> tuple[Any, Any, Any]:
        with b.section("route"):
            scored = self._scored(b, x)
            gates, gate = scored.scores, self.router.gate
            if gate.normalize == "constant":
                gates = gates.new_ones(gates.shape)
            gates = gates * gate.scale if gate.scale != 1.0 else gates
            if self.margin is not None:
                gates = self._constrained(b, gates)
            if b.spec.precision.router_dtype != b.spec.precision.compute_dtype:
                gates = gates.to(b.spec.precision.compute_dtype)
        with b.section("experts"):
            outputs = self._all(b, x)
        best = scored.scores.argmax(-1, keepdim=True)
        load = expert_load(best, self.num_experts, scored.valid)
        every = torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)
        routed = self._chosen(x, gates, every, load)
        return outputs, gates, self._routing(b, scored, routed)

    def _annealed(self, b: Builder, scored: Scored) -> Routed:
        """As many of the best experts as training is at, and the softmax of their logits."""
        assert self.anneal is not None
        most, experts = self.anneal.start, self.num_experts
        facts: dict[str, Any] = {"start": most, "k": self.chosen, "steps": self.anneal.steps}
        b.buffer("annealing", 3, make=annealing_plan, **facts)
        current = b.buffer("current_k", 1, make=number, persistent=True, value=float(most))
        choices = top_k(scored.ranked, most)
        kept = first_choices(choices, current, experts)
        logits = scored.logits.gather(-1, choices)
        weights = logits.masked_fill(kept == experts, float("-inf")).softmax(-1)
        return self._grouped(scored, choices, kept, weights)

    def _opened(self, b: Builder, scored: Scored) -> Routed:
        """Experts that are open, weighed by one."""
        weights = open_gates(scored.scores, b.training)
        kept = chosen_by_any(weights.unsqueeze(1))
        return self._grouped(scored, kept, kept, weights)

    def _grouped(self, scored: Scored, choices: Any, kept: Any, weights: Any) -> Routed:
        """Rows of the choices [B, k] that are kept, and the way back."""
        experts = self.num_experts
        order, ends = sort_by_expert(kept, experts)
        load = expert_load(kept, experts, scored.valid)
        made = self._chosen(scored.tokens, weights, choices, load)
        return replace(
            made,
            rows=lambda tokens: gather_rows(tokens, order),
            ends=ends,
            restore=lambda rows: combine(rows, order, weights),
            kept=kept,
        )

    def _chosen(self, x: Any, weights: Any, choices: Any, load: Any) -> Routed:
        """What routing gives where there are no rows."""
        unused: Any = None
        none = torch.zeros((), device=x.device)
        return Routed(unused, unused, unused, load, none, choices, choices, weights)

    def _constrained(self, b: Builder, gates: Any) -> Any:
        """Gates in training, by how much experts had so far; a margin of infinity is none."""
        size = (self.num_experts,)
        totals = b.buffer("totals", *size, make=torch.zeros, persistent=True, size=size)
        margin = float(self.margin or 0)
        most = b.buffer("margin", 1, make=number, persistent=True, value=margin)
        return constrain_gates(gates, totals, most, b.training)

    def _groups(self) -> Iterator[tuple[VectorExperts, str, int]]:
        """Experts of one shape, a suffix of their parameters' names, and the first one's number."""
        first = 0
        for index, group in enumerate((self.experts, *self.others)):
            yield group, f"_of_{index + 1}" if self.others else "", first
            first += group.count

    def _all(self, b: Builder, x: Any) -> Any:
        """Outputs [B, E, n] of all experts."""
        precision, out = b.spec.precision, self.width or 1
        vectors = x.flatten(0, 1) if self.patches else x
        if precision.expert_dtype != precision.compute_dtype:
            vectors = vectors.to(precision.expert_dtype)
        made = [group.dense(b, vectors, out, suffix) for group, suffix, _ in self._groups()]
        outputs = torch.cat(made, 1) if len(made) > 1 else made[0]
        if self.patches:
            outputs = torch.unflatten(outputs, 0, (-1, self.patches)).sum(1)
        if precision.expert_dtype != precision.compute_dtype:
            outputs = outputs.to(precision.compute_dtype)
        return outputs

    def _sparse(self, b: Builder, x: Any, routed: Routed) -> Any:
        """The weighted sum [B, n] of chosen experts; those of one shape after the other."""
        total = None
        vectors = x.flatten(1) if self.patches else x
        active = Fraction(self.chosen, self.num_experts)  # in the end, if it is annealed
        active = self.stochastic.active if self.stochastic else active
        for group, suffix, first in self._groups():
            with b.section("experts"):
                rows, ends, restore = self._rows(vectors, routed, group, first)
                rows = self._outputs(b, group, rows, ends, suffix, active)
            with b.section("combine"):
                out = restore(rows)
            total = out if total is None else total + out
        return total

    def _rows(self, x: Any, routed: Routed, group: VectorExperts, first: int) -> Any:
        """Rows grouped by expert, where each one's end, and the way back to examples."""
        if not self.others:
            return routed.rows(x), routed.ends, routed.restore
        own = routed.kept - first
        local = own.masked_fill((own < 0) | (own >= group.count), group.count)
        order, ends = sort_by_expert(local, group.count)
        return gather_rows(x, order), ends, lambda rows: combine(rows, order, routed.weights)

    def _outputs(
        self, b: Builder, group: VectorExperts, rows: Any, ends: Any, suffix: str, active: Fraction
    ) -> Any:
        precision = b.spec.precision
        if precision.expert_dtype != precision.compute_dtype:
            rows = rows.to(precision.expert_dtype)
        if self.patches:
            rows = torch.unflatten(rows, -1, (self.patches, b.width)).flatten(0, 1)
            ends = ends * self.patches
        rows = group.grouped(b, rows, ends, self.width or 1, suffix, active)
        if self.patches:
            rows = torch.unflatten(rows, 0, (-1, self.patches)).sum(1)
        if precision.expert_dtype != precision.compute_dtype:
            rows = rows.to(precision.compute_dtype)
        return rows

    def _routing(self, b: Builder, scored: Scored, routed: Routed) -> Any:
        """The record of what happened, with this layer's own losses, weighted."""
        with b.section("statistics"):
            probability = masked_mean(scored.scores, scored.valid)
            outcome = Outcome(self, scored, routed, probability, None)  # type: ignore[arg-type]
            losses = {}
            on = b.spec.train.losses
            for name, loss in self.losses.items():
                if name in self.loss_names(on):
                    value = b.inline(loss, "of_layer", outcome, path=("losses", name))
                    losses[name] = b.name(value * loss.weight, name)
            if self.stochastic and "sparsity" in self.loss_names(on):
                how = self.stochastic
                value = sparsity(scored.scores, how.target, how.variance) * how.weight
                losses["sparsity"] = b.name(value, "sparsity")
            entropy = router_entropy(scored.scores, scored.valid)
        record = b.record(
            "Routing",
            load=routed.load,
            dropped=routed.dropped,
            probability=probability,
            entropy=entropy,
            losses=losses,
        )
        return record
