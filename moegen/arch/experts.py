"""Experts: the networks of a mixture, those that cost nothing, and mixtures inside experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import torch.nn.functional as F
from pydantic import Field

from moegen.arch.activation import Activation, SwiGLU
from moegen.arch.init import ZEROS
from moegen.arch.routing.routed import Routed, Scored, Site
from moegen.arch.routing.router import Router
from moegen.arch.routing.sites import matrix_of_expert
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.experts import grouped_bias, grouped_linear
from moegen.ops.routing import nested_experts
from moegen.spec.element import Element, OneOf, Path
from moegen.spec.words import counted, listed

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


class Nested(Element):
    """A mixture inside every expert, with a router of its own (Shazeer et al. 2017, appendix B).

    A token's weight for an inner expert is the product of both routers' weights.
    """

    shorthand = "count"

    count: int = Field(ge=1, le=10**6, description="inner experts of each expert", examples=[4])
    router: Router = Field(Router(), description="how rows of an expert find its inner ones")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What a router inside an expert can be."""
        for name in ("input", "gates", "balance_bias", "restrict"):
            default = type(self.router).model_fields[name].default
            if getattr(self.router, name) != default:
                yield ("router", name), f"{name} is for routers of tokens, not inside experts"
        if not self.router.score.per_site:
            kind = self.router.score.kind
            yield ("router", "score"), f"there is no {kind} score inside experts; use linear"
        if not (self.router.select.tokens_choose and self.router.select.causal):
            kind = self.router.select.kind
            yield ("router", "select"), f"there is no {kind} inside experts; use top_k or all"
        if self.router.gate.blend:
            yield ("router", "gate", "blend"), "blend is for routers of tokens, not inside experts"
        second = getattr(self.router.select, "second", None)
        if second is not None and second.takes_slot:
            sentence = "there is no capacity inside experts, so nothing takes up a slot"
            yield ("router", "select", "second", "takes_slot"), sentence
        if self.router.gate.after_drop and not (second is not None and second.skips):
            sentence = "there is no capacity inside experts, so nothing is dropped"
            yield ("router", "gate", "after_drop"), sentence
        for path, sentence in self.router.select.check(self.count, 1):
            yield ("router", "select", *path), sentence

    def says(self, setting: Setting) -> Iterator[str]:
        """The same parts once more, inside."""
        inner = Inner(self.router, self.count, setting.moe.total_experts)
        inside = setting.within(inner)
        yield f"Each expert routes its tokens to its {counted(self.count, 'inner expert')}."
        for name, part in self.router.parts():
            if name != "input":
                yield from part.says(inside)
        yield "A token's weight for an inner expert is the product of both routers' weights."


class Experts(Element):
    """The routed experts: feed-forward networks of one shape."""

    shorthand = "count"

    count: int = Field(
        ge=1, le=10**7, description="routed experts, before granularity", examples=[8]
    )
    width: int = Field(
        ge=1, le=10**7, description="hidden width, before granularity", examples=[1024]
    )
    activation: Annotated[Activation, OneOf(Activation)] = Field(
        SwiGLU(), description="activation, e.g. swiglu, relu"
    )
    bias: bool = Field(False, description="whether the projections have a bias")
    residual: bool = Field(
        False, description="x + f(norm(x)) instead of f(x), norm without parameters (BASE)"
    )
    sublayers: int = Field(1, ge=1, le=64, description="residual networks after each other")
    identity: int = Field(
        0, ge=0, le=10**6, description="more experts that give back the token, at no cost"
    )
    zero: int = Field(0, ge=0, le=10**6, description="more experts that give nothing, at no cost")
    nested: Nested | None = Field(None, description="a mixture inside each expert")
    recompute: bool = Field(
        False, description="keep tokens alone for backward, and compute the first product again"
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Sublayers are residual."""
        if self.sublayers > 1 and not self.residual:
            yield ("sublayers",), "more than one sublayer needs residual: true"

    def says(self, setting: Setting) -> Iterator[str]:
        """Which networks, what they are given, and what becomes of what they give."""
        moe, soft = setting.moe, setting.router.select.kind == "soft"
        precision = setting.spec.precision
        form = precision.experts or precision.compute or precision.parameters
        rows = "Slots" if soft else "Tokens"
        what = f"{setting.width:,} to {moe.expert_width:,} to {setting.width:,} numbers"
        bias = "with biases" if self.bias else "without biases"
        inner = ""
        if self.nested:
            inner = f"a mixture of {counted(self.nested.count, 'inner expert')} of "
        each = f"each {inner}{self.activation.kind}, {what}, {bias}, in {form}"
        yield f"{rows} go to {counted(moe.num_experts, 'expert')}, {each}."
        if moe.granularity > 1:
            yield (
                f"These are {self.count:,} experts {self.width:,} wide, each cut into "
                f"{moe.granularity:,}."
            )
        if self.residual:
            each = "" if self.sublayers == 1 else f", {self.sublayers} times in turn"
            yield f"An expert computes x + f(norm(x)){each}; its norm has no parameters."
        if setting.spec.train.dropout.experts:
            yield f"In training there is dropout of {setting.spec.train.dropout.experts:g} inside."
        if self.recompute:
            yield (
                "For the backward pass tokens alone are kept; the experts' first product is "
                "computed again there."
            )
        if self.free:
            gives = [
                f"{count:,} more {'gives' if count == 1 else 'give'} {what}"
                for count, what in ((self.identity, "back the token"), (self.zero, "nothing"))
                if count
            ]
            yield f"{listed(gives, 'and')}, at no cost."
        if not soft:
            yield "A token's output is the sum of its experts' outputs, times their weights."

    @property
    def free(self) -> int:
        """Experts without parameters."""
        return self.identity + self.zero


@dataclass(frozen=True)
class Inner:
    """The mixture inside experts as its router's selection sees it."""

    router: Router
    num_experts: int
    total_experts: int
    at: Path = ("experts", "nested")
    capacity: None = None
    granularity: int = 1
    num_identity: int = 0

    @property
    def num_choices(self) -> int:
        """Inner experts that a row can choose."""
        return self.num_experts


@dataclass(frozen=True)
class Decided:
    """What was decided inside experts: scores and choices of their rows, and rows' outer weights.

    outer: the outer router's weight of each row [N], 0 for those that are not real.
    """

    scored: Scored
    routed: Routed
    outer: Any
    ends: Any


def compute(b: Builder, moe: MoE, rows: Any, routed: Routed, training: bool) -> tuple[Any, Any]:
    """Rows [N, d] grouped by expert to the experts' outputs [N, d], and what was decided inside."""
    nested = moe.experts.nested
    if nested is None:
        return _network(b, moe, rows, routed.ends), None
    inner = Inner(nested.router, nested.count, moe.total_experts)
    site = Site(
        choices=nested.count,
        valid=routed.row_valid() if training else None,
        sequences=(1, rows.shape[0]),
        ids={},
        group=None,
        linear=matrix_of_expert(routed.ends, moe.num_experts, moe.router.select.active(moe)),
        spread=_spread(routed.ends, nested.count),
    )
    path = (*inner.at, "router")
    scored = b.inline(nested.router, "scored", rows, site, inner.at, path=path)
    within = b.inline(nested.router.select, "route", inner, scored, path=(*path, "select"))
    out = within.restore(_network(b, moe, within.rows(rows), within.ends))
    outer = routed.row_weights() if training else None
    return out, Decided(scored, within, outer, routed.ends)


def _spread(ends: Any, inner: int) -> Callable[[Any], Any]:
    """From inner choices to those of the whole layer, once for those counted and dispatched."""
    known: dict[int, tuple[Any, Any]] = {}

    def spread(experts: Any) -> Any:
        if id(experts) not in known:
            leaves = nested_experts(experts, ends, inner)
            known[id(experts)] = (experts, leaves)  # held, so that the id stays its own
        return known[id(experts)][1]

    return spread


def active(moe: MoE) -> Fraction:
    """The fraction of the experts' parameters that a token uses, on average."""
    share = Fraction(moe.router.select.active(moe))
    nested = moe.experts.nested
    if nested is None:
        return share
    inner = Inner(nested.router, nested.count, moe.total_experts)
    return share * nested.router.select.active(inner)


def _network(b: Builder, moe: MoE, rows: Any, ends: Any) -> Any:
    """Every expert's feed-forward network, one residual sublayer after the other."""
    if not moe.experts.residual:
        return _feed_forward(b, moe, rows, ends, "")
    stream = b.name(rows, "stream")
    for sublayer in range(moe.experts.sublayers):
        suffix = f"_{sublayer + 1}" if sublayer else ""
        normed = F.layer_norm(stream, (b.width,))
        out = _feed_forward(b, moe, normed, ends, suffix)
        stream = stream + out
    return stream


def _feed_forward(b: Builder, moe: MoE, rows: Any, ends: Any, suffix: str) -> Any:
    activation = moe.experts.activation
    width = moe.expert_width * (2 if activation.gated else 1)
    name = "gate_up" if activation.gated else "up"
    hidden = _linear(b, moe, f"{name}{suffix}", rows, ends, b.width, width)
    if activation.gated:
        gate, up = hidden.chunk(2, -1)
        hidden = activation.apply(gate, up)
    else:
        hidden = activation.apply(hidden)
    rate = b.spec.train.dropout.experts
    if rate:
        hidden = F.dropout(hidden, rate, b.training)
    out = b.width
    return _linear(b, moe, f"down{suffix}", hidden, ends, moe.expert_width, out)


def _linear(b: Builder, moe: MoE, name: str, rows: Any, ends: Any, width: int, out: int) -> Any:
    count, dtype = moe.total_experts, b.spec.precision.expert_dtype
    facts: dict[str, Any] = {"role": "routed_experts", "compute": dtype}
    facts["active"] = active(moe)
    rows = grouped_linear(rows, b.param(name, count, out, width, **facts), ends)
    if moe.experts.bias:
        bias = b.param(f"{name}_bias", count, out, init=ZEROS, **facts)
        rows = grouped_bias(rows, bias, ends)
    return rows
