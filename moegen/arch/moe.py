"""The routed layer: route, dispatch, experts, combine, and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from moegen.arch.activation import Activation, SwiGLU
from moegen.arch.capacity import Capacity
from moegen.arch.feed_forward import ExtraFeedForward, ResidualFeedForward, SharedExperts
from moegen.arch.init import ZEROS
from moegen.arch.losses import AuxiliaryLoss
from moegen.arch.placement import Placement
from moegen.arch.routing.routed import Routed, Scored
from moegen.arch.routing.router import Router
from moegen.graph.builder import Builder
from moegen.graph.layer import Layer
from moegen.ops.balance import move_bias
from moegen.ops.experts import grouped_bias, grouped_linear
from moegen.ops.losses import masked_mean
from moegen.spec.element import Element, OneOf, Path


class Experts(Element):
    """The routed experts: feed-forward networks of one shape."""

    shorthand = "count"

    count: int = Field(ge=1, le=10**7, description="routed experts, before granularity")
    width: int = Field(ge=1, le=10**7, description="hidden width, before granularity")
    activation: Annotated[Activation, OneOf(Activation)] = Field(
        SwiGLU(), description="activation, e.g. swiglu, relu"
    )
    bias: bool = Field(False, description="whether the projections have a bias")


class Shared(Element):
    """Experts that every token meets."""

    shorthand = "count"

    count: int = Field(1, ge=1, le=10**6, description="how many, each as wide as `width`")
    width: int | None = Field(None, ge=1, le=10**7, description="hidden width; a routed expert's")
    gate: bool = Field(False, description="weigh their output by sigmoid(x w) (Qwen MoE)")


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
    capacity: Capacity | None = Field(None, description="bound on an expert's rows; null: none")
    losses: Losses = Field({}, description="auxiliary losses by name: balance, z, ...")
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
        for path, sentence in select.check(self.num_experts, self.granularity):
            yield ("router", "select", *path), sentence
        if router.restrict:
            chosen = select.chosen(self.granularity)
            for path, sentence in router.restrict.check(self.num_experts, chosen):
                yield ("router", "restrict", *path), sentence
        if self.capacity and not select.takes_capacity:
            yield ("capacity",), f"{select.kind} fills every expert equally and has no capacity"
        if router.gate.normalize == "softmax_over_kept" and not router.affinity.sums_to_one:
            sentence = f"softmax_over_kept leaves no use for affinity {router.affinity.kind}"
            yield ("router", "gate"), sentence
        if not select.chosen(1):
            yield from self._expert_side()
        yield from self._broken_overrides()

    def _expert_side(self) -> Iterator[tuple[Path, str]]:
        """What makes no sense where experts choose."""
        kind = self.router.select.kind
        for name, loss in self.losses.items():
            if loss.needs_choices:
                yield ("losses", name), f"loads under {kind} are equal, so {name} has no use"
        if self.router.gate.normalize != "none":
            yield ("router", "gate"), f"under {kind} gates are the scores; normalize must be none"
        for name in ("balance_bias", "restrict"):
            if getattr(self.router, name):
                yield ("router", name), f"{name} is for tokens that choose, not for {kind}"

    def _broken_overrides(self) -> Iterator[tuple[Path, str]]:
        pooled = any(loss.pooled for loss in self.losses.values())
        for index, override in enumerate(self.overrides):
            extra = override.model_extra or {}
            for name in ("losses", "placement", "overrides"):
                if name in extra:
                    yield ("overrides", index, name), f"{name} holds for all routed layers"
            try:
                other = self._override(index)
                alike = (other.num_experts, other.chosen) == (self.num_experts, self.chosen)
                if pooled and not alike:
                    sentence = "a pooled loss needs the same experts and k in every layer"
                    yield ("overrides", index), sentence
            except ValidationError as error:
                for detail in error.errors():
                    context = detail.get("ctx", {}).get("error")
                    for path, sentence in getattr(context, "problems", [((), detail["msg"])]):
                        yield ("overrides", index, *detail["loc"], *path), sentence

    # Facts

    @property
    def num_experts(self) -> int:
        """E: routed experts, granularity applied."""
        return self.experts.count * self.granularity

    @property
    def expert_width(self) -> int:
        """n: hidden width of a routed expert, granularity applied."""
        return self.experts.width // self.granularity

    @property
    def chosen(self) -> int:
        """k: experts that a token takes, granularity applied; 0 where experts choose."""
        return int(self.router.select.chosen(self.granularity))

    def in_layer(self, layer: int) -> tuple[MoE, Path]:
        """The MoE of one layer, and where the spec says it."""
        for index, override in enumerate(self.overrides):
            if layer in override.layers:
                return self._override(index), ("model", "moe", "overrides", index)
        return self.model_copy(update={"overrides": ()}), ("model", "moe")

    def _override(self, index: int) -> MoE:
        base = self.model_dump(exclude={"overrides"})
        change = self.overrides[index].model_dump(exclude={"layers"})
        return MoE.model_validate(merged(base, change))

    def describe(self, spec: Any) -> str:
        """`Mixture of 256 experts, 2048 wide: 8 a token, 1 shared.`"""
        select = self.router.select
        share = select.active(self) * self.num_experts
        met = f"{self.chosen} a token" if self.chosen else f"{float(share):g} a token on average"
        shared = f", {self.shared.count} shared" if self.shared else ""
        return f"Mixture of {self.num_experts} experts, {self.expert_width} wide: {met}{shared}."

    def programs(self) -> tuple[str, ...]:
        """Training, decoding, and the balance bias's update where there is one."""
        update = ("update_balance",) if self.router.balance_bias else ()
        return ("forward", "step", *update)

    # Programs

    def forward(self, b: Builder, x: Any, valid: Any) -> Any:
        """x [B, S, d] and valid [B * S] to [B, S, d] and what routing did."""
        tokens = x.flatten(0, 1)
        with b.section("route"):
            scored = self.router.scored(b, self, tokens, valid, (x.shape[0], x.shape[1]))
            routed = b.inline(self.router.select, "route", self, scored, path=("router", "select"))
        out = self._mix(b, tokens, routed)
        with b.section("statistics"):
            probability = masked_mean(scored.scores, valid)
            losses = self._losses(b, scored, routed, probability)
        out = out.view_as(x)
        routing = b.record(
            "Routing",
            load=routed.load,
            dropped=routed.dropped,
            probability=probability,
            losses=losses,
        )
        return out, routing

    def step(self, b: Builder, x: Any) -> Any:
        """x [B, T, d] to [B, T, d], nothing dropped and nothing counted."""
        tokens = x.flatten(0, 1)
        with b.section("route"):
            scored = self.router.scored(b, self, tokens, None, (x.shape[0], x.shape[1]))
            routed = b.inline(self.router.select, "route", self, scored, path=("router", "select"))
        return self._mix(b, tokens, routed).view_as(x)

    def update_balance(self, b: Builder, load: Any) -> Any:
        """Move the balance bias by the load [E] of the step."""
        assert self.router.balance_bias is not None
        return move_bias(self.router.bias(b, self), load, self.router.balance_bias.rate)

    # Parts

    def _losses(self, b: Builder, scored: Scored, routed: Routed, probability: Any) -> Any:
        """This layer's auxiliary losses by name, not weighted."""
        values = {}
        for name, loss in self.losses.items():
            if not loss.pooled:
                path = ("losses", name)
                value = b.inline(loss, "of_layer", scored, routed, probability, path=path)
                values[name] = b.name(value, name)
        return values

    def _mix(self, b: Builder, tokens: Any, routed: Routed) -> Any:
        """tokens [T, d] to the weighted sum of their experts' outputs [T, d], and the rest."""
        precision = b.spec.precision
        with b.section("experts"):
            rows = routed.rows(tokens)
            if precision.expert_dtype != precision.compute_dtype:
                rows = rows.to(precision.expert_dtype)
            rows = b.inline(self, "_compute", rows, routed.ends, path=("experts",))
        with b.section("combine"):
            out = routed.restore(rows)
            if precision.expert_dtype != precision.compute_dtype:
                out = out.to(precision.compute_dtype)
            if self.shared:
                out = out + self._shared(b, tokens)
            if self.residual:
                beside = b.child(
                    "residual", self.residual, tokens, path=("residual",), role="dense"
                )
                out = out + beside
        return out

    def _compute(self, b: Builder, rows: Any, ends: Any) -> Any:
        """Rows [N, d] grouped by expert to the experts' outputs [N, d]."""
        activation = self.experts.activation
        width = self.expert_width * (2 if activation.gated else 1)
        hidden = self._linear(b, "gate_up" if activation.gated else "up", rows, ends, width)
        if activation.gated:
            gate, up = hidden.chunk(2, -1)
            hidden = activation.apply(gate, up)
        else:
            hidden = activation.apply(hidden)
        rate = b.spec.train.dropout.experts
        if rate:
            hidden = F.dropout(hidden, rate, b.training)
        return self._linear(b, "down", hidden, ends, b.spec.model.d_model)

    def _linear(self, b: Builder, name: str, rows: Any, ends: Any, out: int) -> Any:
        count, dtype = self.num_experts, b.spec.precision.expert_dtype
        facts: dict[str, Any] = {"role": "routed_experts", "compute": dtype}
        facts["active"] = self.router.select.active(self)
        width = self.expert_width if name == "down" else b.spec.model.d_model
        rows = grouped_linear(rows, b.param(name, count, out, width, **facts), ends)
        if self.experts.bias:
            bias = b.param(f"{name}_bias", count, out, init=ZEROS, **facts)
            rows = grouped_bias(rows, bias, ends)
        return rows

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
            weight = b.param("shared_gate", 1, b.spec.model.d_model, role=role)
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
