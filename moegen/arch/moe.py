"""The routed layer: route, dispatch, experts, combine, and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from moegen.arch.capacity import Capacity
from moegen.arch.experts import Decided, Experts, compute
from moegen.arch.feed_forward import ExtraFeedForward, ResidualFeedForward, Shared, SharedExperts
from moegen.arch.loads import loads_apart
from moegen.arch.losses.auxiliary import AuxiliaryLoss, Outcome
from moegen.arch.mixture_rules import of_mixture, unknown_key
from moegen.arch.placement import Placement
from moegen.arch.routing.routed import Routed, Scored, Site
from moegen.arch.routing.router import Router
from moegen.arch.routing.sites import matrix_of_id, one_matrix
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.graph.layer import Layer
from moegen.ops.attention import at_most
from moegen.ops.balance import move_bias
from moegen.ops.information import router_entropy
from moegen.ops.losses import masked_mean
from moegen.spec.element import Element, OneOf, Path


def _by_name(value: Any) -> Any:
    """`balance: 0.01` as `balance: {kind: balance, weight: 0.01}`; 0 and none are no loss."""
    if not isinstance(value, dict):
        return value
    named = {}
    for name, loss in value.items():
        if loss in (None, "none") or loss == 0:
            continue
        named[name] = {"kind": name, **(loss if isinstance(loss, dict) else {"weight": loss})}
    return named


Loss = Annotated[AuxiliaryLoss, OneOf(AuxiliaryLoss)]
Losses = Annotated[dict[str, Loss], BeforeValidator(_by_name)]
Group = Literal["batch", "sequence"] | Annotated[int, Field(ge=1, le=10**9)]


class Override(Element):
    """Another MoE in some layers: keys of `moe` that differ there."""

    model_config = {"extra": "allow"}
    layers: tuple[int, ...] = Field(min_length=1, description="layers where it stands")


class MoE(Layer):
    """A mixture of experts in place of a feed-forward network."""

    placement: Placement = Field(Placement(), description="the layers that are routed")
    experts: Experts = Field(description="the routed experts")
    granularity: int = Field(
        1, ge=1, le=10**5, description="m: m times the experts, each 1/m as wide, m times k"
    )
    shared: Shared | None = Field(None, description="experts that every token meets")
    residual: ResidualFeedForward | None = Field(
        None, description="a dense network whose output is added to the routed one's"
    )
    extra: ExtraFeedForward | None = Field(
        None, description="a dense network on a branch of its own after the routed one (ST-MoE)"
    )
    router: Router = Field(Router(), description="how tokens find experts")
    group: Group = Field(
        "batch",
        description="tokens that compete for capacity and are balanced together: the batch, each "
        "sequence, or runs of so many",
    )
    capacity: Capacity | None = Field(None, description="bound on an expert's rows; null: none")
    losses: Losses = Field({}, description="auxiliary losses by name: balance, z, ...")
    non_causal: Literal["warn", "accept"] = Field(
        "warn", description="accept: no warning that a decoder's routing looks ahead"
    )
    overrides: tuple[Override, ...] = Field((), description="other settings in some layers")

    @model_validator(mode="before")
    @classmethod
    def _no_capacity(cls, value: Any) -> Any:
        parts = ("capacity", "shared", "residual", "extra")
        if isinstance(value, dict) and any(value.get(p) == "none" for p in parts):
            return {k: None if k in parts and v == "none" else v for k, v in value.items()}
        return value

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What the parts need of each other."""
        if self.experts.width % self.granularity:
            sentence = f"granularity {self.granularity} must divide the width {self.experts.width}"
            yield ("granularity",), sentence
        select, router = self.router.select, self.router
        for path, sentence in select.check(self.num_choices, self.granularity):
            yield ("router", "select", *path), sentence
        if router.restrict:
            for path, sentence in router.restrict.check(self.num_choices, self.chosen):
                yield ("router", "restrict", *path), sentence
        yield from of_mixture(self)
        for name, loss in self.losses.items():
            for path, sentence in loss.check(self):
                yield ("losses", name, *path), sentence
        yield from self._broken_overrides()

    def _broken_overrides(self) -> Iterator[tuple[Path, str]]:
        pooled = any(loss.pooled for loss in self.losses.values())
        for index, override in enumerate(self.overrides):
            extra = override.model_extra or {}
            for name in ("losses", "placement", "overrides"):
                if name in extra:
                    yield ("overrides", index, name), f"{name} holds for all routed layers"
            try:
                other = self._override(index)
                facts = [(m.num_experts, m.chosen, m.group) for m in (self, other)]
                if pooled and facts[0] != facts[1]:
                    sentence = "a pooled loss needs the same experts, k and group in every layer"
                    yield ("overrides", index), sentence
            except ValidationError as error:
                for detail in error.errors():
                    context = detail.get("ctx", {}).get("error")
                    plain = unknown_key(self, detail["loc"]) or detail["msg"]
                    for path, sentence in getattr(context, "problems", [((), plain)]):
                        yield ("overrides", index, *detail["loc"], *path), sentence

    # Facts

    @property
    def num_experts(self) -> int:
        """E: routed experts, granularity applied."""
        return self.experts.count * self.granularity

    @property
    def num_choices(self) -> int:
        """What a token can choose: routed experts and those without parameters."""
        return self.num_experts + self.experts.free

    @property
    def num_identity(self) -> int:
        """Experts that give back the token; they come after the routed ones."""
        return self.experts.identity

    @property
    def total_experts(self) -> int:
        """Networks in all: with mixtures inside experts, all inner ones."""
        nested = self.experts.nested
        return self.num_experts * (nested.count if nested else 1)

    @property
    def at(self) -> Path:
        """Where its router stands below its own place in the spec: nowhere else."""
        return ()

    @property
    def expert_width(self) -> int:
        """n: hidden width of a routed expert, granularity applied."""
        return self.experts.width // self.granularity

    @property
    def chosen(self) -> int:
        """k: experts that a token takes, granularity applied; 0 where tokens do not choose."""
        return int(self.router.select.chosen(self.granularity, self.num_choices))

    @property
    def group_kind(self) -> str:
        """batch, sequence, or run."""
        if "group" not in self.model_fields_set and "batch" not in self.router.select.takes_groups:
            return str(self.router.select.takes_groups[0])
        return "run" if isinstance(self.group, int) else self.group

    def given(self) -> tuple[str, ...]:
        """Names of the ids that its programs are given, each once."""
        names = list(self.router.ids())
        for loss in self.losses.values():
            names += loss.ids()
        return tuple(dict.fromkeys(names))

    def in_layer(self, layer: int) -> tuple[MoE, Path]:
        """The MoE of one layer, and where the spec says it."""
        for index, override in enumerate(self.overrides):
            if layer in override.layers:
                return self._override(index), ("model", "moe", "overrides", index)
        return self.model_copy(update={"overrides": ()}), ("model", "moe")

    def _override(self, index: int) -> MoE:
        base = self.model_dump(exclude={"overrides"}, exclude_unset=True)
        change = self.overrides[index].model_dump(exclude={"layers"})
        return MoE.model_validate(merged(base, change))

    def describe(self, spec: Any) -> str:
        """`Mixture of 256 experts, 2048 wide: 8 a token, 1 shared.`"""
        select = self.router.select
        share = select.active(self) * self.num_choices
        met = f"{self.chosen} a token" if self.chosen else f"{float(share):g} a token on average"
        met = "all for every token" if share == self.num_choices else met
        shared = f", {self.shared.count} shared" if self.shared else ""
        free = f" and {self.experts.free} without parameters" if self.experts.free else ""
        nested = self.experts.nested
        inner = f", each a mixture of {nested.count}" if nested else ""
        wide = f"{self.num_experts} experts{free}{inner}, {self.expert_width} wide"
        return f"Mixture of {wide}: {met}{shared}."

    def says(self, setting: Setting) -> Iterator[str]:
        """Which tokens compete, and whether anything is refused at all."""
        if self.capacity or not self.router.select.tokens_choose:
            return  # they say among which tokens
        if self.router.select.kind != "balanced":
            yield "There is no capacity: nothing is refused."

    def programs(self) -> tuple[str, ...]:
        """Training, decoding, and the balance bias's update where there is one."""
        update = ("update_balance",) if self.router.balance_bias else ()
        return ("forward", "step", *update)

    # Programs

    def forward(self, b: Builder, x: Any, valid: Any, **ids: Any) -> Any:
        """x [B, S, d], valid [B * S] and ids [B * S] to [B, S, d] and what routing did."""
        tokens = x.flatten(0, 1)
        with b.section("route"):
            scored, routed = self._route(b, x, tokens, valid, ids)
        out, inside = self._mix(b, tokens, routed, training=True)
        with b.section("statistics"):
            probability = masked_mean(scored.scores, valid)
            if scored.site.choices != self.num_choices:  # of slots
                probability = torch.unflatten(probability, 0, (self.num_choices, -1)).sum(-1)
            outcome = Outcome(self, scored, routed, probability, inside)
            losses = self._losses(b, outcome)
            entropy = router_entropy(scored.scores, valid)
            pooled: dict[str, Any] = {}
            for loss in self.losses.values():
                pooled |= loss.pools(b, outcome)
        out = out.view_as(x)
        routing = b.record(
            "Routing",
            load=inside.routed.load if inside else routed.load,
            **loads_apart(b, self, routed, valid, ids),
            dropped=routed.dropped,
            probability=probability,
            entropy=entropy,
            losses=losses,
            **pooled,
        )
        return out, routing

    def step(self, b: Builder, x: Any, **ids: Any) -> Any:
        """x [B, T, d] to [B, T, d], nothing dropped and nothing counted."""
        tokens = x.flatten(0, 1)
        with b.section("route"):
            _, routed = self._route(b, x, tokens, None, ids)
        out, _ = self._mix(b, tokens, routed, training=False)
        return out.view_as(x)

    def update_balance(self, b: Builder, load: Any) -> Any:
        """Move the balance bias by the load [E] of the step."""
        assert self.router.balance_bias is not None
        return move_bias(self.router.bias(b, self.num_choices), load, self.router.balance_bias.rate)

    # Parts

    def _route(
        self, b: Builder, x: Any, tokens: Any, valid: Any, ids: dict[str, Any]
    ) -> tuple[Scored, Routed]:
        gates = self.router.gates
        site = Site(
            choices=self.router.select.logits(self.num_choices),
            valid=valid,
            sequences=(x.shape[0], x.shape[1]),
            ids=ids,
            group=self._group(x, tokens),
            linear=matrix_of_id(ids[gates.id], gates.count) if gates else one_matrix,
        )
        scored = b.inline(self.router, "scored", tokens, site, path=("router",))
        routed = b.inline(self.router.select, "route", self, scored, path=("router", "select"))
        return scored, routed

    def _group(self, x: Any, tokens: Any) -> Any:
        """Tokens that compete, a number; None if it is all of them."""
        if isinstance(self.group, int):
            group = at_most(self.group, tokens.shape[0])
            return group
        return x.shape[1] if self.group_kind == "sequence" else None

    def _losses(self, b: Builder, outcome: Outcome) -> Any:
        """This layer's auxiliary losses by name, not weighted."""
        values = {}
        for name, loss in self.losses.items():
            if not loss.pooled:
                value = b.inline(loss, "of_layer", outcome, path=("losses", name))
                values[name] = b.name(value, name)
        return values

    def _mix(
        self, b: Builder, tokens: Any, routed: Routed, training: bool
    ) -> tuple[Any, Decided | None]:
        """tokens [T, d] to the weighted sum of their experts' outputs [T, d], and the rest."""
        precision, masking = b.spec.precision, b.spec.train.masking
        with b.section("experts"):
            rows = routed.rows(tokens)
            if precision.expert_dtype != precision.compute_dtype:
                rows = rows.to(precision.expert_dtype)
            rows, inside = compute(b, self, rows, routed, training)
            rows = masking.of_rows(b, rows) if masking else rows
        with b.section("combine"):
            out = routed.restore(rows)
            if precision.expert_dtype != precision.compute_dtype:
                out = out.to(precision.compute_dtype)
            if routed.through is not None:
                through = routed.through.unsqueeze(-1)
                if precision.router_dtype != precision.compute_dtype:
                    through = through.to(precision.compute_dtype)
                out = out + through * tokens
            out = masking.of_tokens(b, out) if masking else out
            if self.shared:
                out = out + self._shared(b, tokens)
            if self.residual:
                beside = b.child(
                    "residual", self.residual, tokens, path=("residual",), role="dense"
                )
                out = out + beside
        return out, inside

    def _shared(self, b: Builder, tokens: Any) -> Any:
        assert self.shared is not None
        network = SharedExperts(
            width=self.shared.count * (self.shared.width or self.expert_width),
            activation=self.experts.activation,
            bias=self.experts.bias,
        )
        role = "shared_experts"
        shared = b.child("shared", network, tokens, path=("shared",), role=role)
        if self.shared.gate:
            weight = b.param("shared_gate", 1, b.width, role=role)
            shared = shared * torch.sigmoid(F.linear(tokens, weight))
        return shared


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """base with change laid over it, mapping by mapping; another kind replaces the whole."""
    out = dict(base)
    for key, value in change.items():
        old = out.get(key)
        same = isinstance(old, dict) and isinstance(value, dict)
        if isinstance(old, dict) and isinstance(value, dict):
            same = value.get("kind", old.get("kind")) == old.get("kind")
        out[key] = merged(old, value) if same and old else value
    return out
