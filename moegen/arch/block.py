"""Blocks: attention and a feed-forward part, each on a residual branch with its norm."""

from __future__ import annotations

from typing import Annotated, Any

import torch.nn.functional as F

from moegen.arch.attention import Attention
from moegen.arch.feed_forward import FeedForward
from moegen.arch.moe import MoE
from moegen.arch.norm import Norm
from moegen.graph.builder import Builder
from moegen.graph.layer import Layer
from moegen.spec.element import OneOf, Path


class Block(Layer):
    """One layer of a stack. Made by the model; a spec writes its parts."""

    norm: Annotated[Norm, OneOf(Norm)]
    attention: Annotated[Attention, OneOf(Attention)]
    ffn: FeedForward | None = None
    moe: MoE | None = None
    moe_path: Path = ()
    routing: bool = False  # whether any layer of the stack is routed
    residual_scale: float = 1.0

    def class_name(self) -> str:
        """Named by what alternates in the stack."""
        sliding = "Sliding" if self.attention.window else ""
        kind = ("MoE" if self.moe else "Dense") if self.routing else ""
        return f"{sliding}{kind}Block"

    def describe(self, spec: Any) -> str:
        """`Attention and a mixture of experts, each on a residual branch.`"""
        part = "a mixture of experts" if self.moe else "a feed-forward network"
        return f"Attention and {part}, each on a residual branch."

    def programs(self) -> tuple[str, ...]:
        """Those of its attention, and the balance bias's update."""
        balanced = self.moe and self.moe.router.balance_bias
        update = ("update_balance",) if balanced else ()
        return (*self.attention.programs(), *update)

    def forward(self, b: Builder, x: Any, context: Any) -> Any:
        """x [B, S, d] to [B, S, d], and the routing records of this layer."""
        x = self._attention(b, x, context)
        h = self._before(b, "ffn_norm", x)
        if self.moe:
            out, routing = self._routed(b, h, context.valid, *self._ids(context))
            x = self._after(b, "ffn_norm", x, out)
            return self._extra(b, x), (routing,)
        x = self._after(b, "ffn_norm", x, self._dense(b, h))
        return (x, ()) if self.routing else x

    def step(self, b: Builder, x: Any, context: Any, cache: Any) -> Any:
        """x [B, T, d] to [B, T, d] with this layer's cache."""
        x = self._attention(b, x, context, cache)
        h = self._before(b, "ffn_norm", x)
        out = self._routed(b, h, *self._ids(context)) if self.moe else self._dense(b, h)
        return self._extra(b, self._after(b, "ffn_norm", x, out))

    def new_cache(self, b: Builder, batch: Any, length: Any) -> Any:
        """What attention keeps between steps."""
        path = ("model", "attention")
        return b.child("attention", self.attention, batch, length, path=path, role="attention")

    def update_balance(self, b: Builder, load: Any) -> Any:
        """Pass on to the router."""
        return self._routed(b, load)

    # Branches

    def _attention(self, b: Builder, x: Any, *rest: Any) -> Any:
        h = self._before(b, "attention_norm", x)
        path = ("model", "attention")
        out = b.child("attention", self.attention, h, *rest, path=path, role="attention")
        return self._after(b, "attention_norm", x, out)

    def _routed(self, b: Builder, *inputs: Any) -> Any:
        assert self.moe is not None
        return b.child("moe", self.moe, *inputs, path=self.moe_path, role="routed_experts")

    def _ids(self, context: Any) -> list[Any]:
        """What the router reads beside tokens."""
        assert self.moe is not None
        return [getattr(context, name) for name in self.moe.given()]

    def _dense(self, b: Builder, h: Any) -> Any:
        assert self.ffn is not None
        return b.child("ffn", self.ffn, h, path=("model", "ffn"), role="dense")

    def _extra(self, b: Builder, x: Any) -> Any:
        """The dense branch after a routed one, where there is one."""
        if not (self.moe and self.moe.extra):
            return x
        norm = self.norm if self.moe.extra.norm_scale else self.norm.plain()
        h = self._before(b, "extra_norm", x, norm)
        path = (*self.moe_path, "extra")
        out = b.child("extra", self.moe.extra, h, path=path, role="dense")
        return self._after(b, "extra_norm", x, out, norm)

    def _before(self, b: Builder, name: str, x: Any, norm: Norm | None = None) -> Any:
        if self.norm.placement in ("pre", "sandwich"):
            return self._norm(b, name, x, norm)
        return x

    def _after(self, b: Builder, name: str, x: Any, out: Any, norm: Norm | None = None) -> Any:
        placement = self.norm.placement
        if placement in ("output", "sandwich"):
            out = self._norm(b, f"{name}_out" if placement == "sandwich" else name, out, norm)
        if b.spec.train.dropout.dense:
            out = F.dropout(out, b.spec.train.dropout.dense, b.training)
        if self.residual_scale != 1.0:
            out = out * self.residual_scale
        x = x + out
        return self._norm(b, name, x, norm) if placement == "post" else x

    def _norm(self, b: Builder, name: str, x: Any, norm: Norm | None = None) -> Any:
        width = b.width
        return b.inline(norm or self.norm, "apply", name, x, width, path=("model", "norm"))


class InsertedBlock(Layer):
    """A mixture as a layer of its own between the stack's others, as BASE layers are (2021).

    Residual experts are the branch themselves; others stand on one, behind a norm.
    """

    norm: Annotated[Norm, OneOf(Norm)]
    moe: MoE
    moe_path: Path = ()
    residual_scale: float = 1.0

    def describe(self, spec: Any) -> str:
        """`A mixture of experts as a layer of its own.`"""
        return "A mixture of experts as a layer of its own."

    def programs(self) -> tuple[str, ...]:
        """As other layers of the stack."""
        update = ("update_balance",) if self.moe.router.balance_bias else ()
        return ("forward", "step", "new_cache", *update)

    def forward(self, b: Builder, x: Any, context: Any) -> Any:
        """x [B, S, d] to [B, S, d], and the routing record of this layer."""
        ids = [getattr(context, name) for name in self.moe.given()]
        out, routing = self._routed(b, self._normed(b, x), context.valid, *ids)
        return self._added(x, out), (routing,)

    def step(self, b: Builder, x: Any, context: Any, cache: Any) -> Any:
        """x [B, T, d] to [B, T, d]; there is nothing to keep in the cache."""
        ids = [getattr(context, name) for name in self.moe.given()]
        return self._added(x, self._routed(b, self._normed(b, x), *ids))

    def new_cache(self, b: Builder, batch: Any, length: Any) -> Any:
        """Nothing: a mixture treats every position alone."""
        return ()

    def update_balance(self, b: Builder, load: Any) -> Any:
        """Pass on to the router."""
        return self._routed(b, load)

    def _routed(self, b: Builder, *inputs: Any) -> Any:
        return b.child("moe", self.moe, *inputs, path=self.moe_path, role="routed_experts")

    def _normed(self, b: Builder, x: Any) -> Any:
        if self.moe.experts.residual:
            return x
        return b.inline(self.norm, "apply", "norm", x, b.width, path=("model", "norm"))

    def _added(self, x: Any, out: Any) -> Any:
        if self.moe.experts.residual:
            return out
        return x + (out * self.residual_scale if self.residual_scale != 1.0 else out)
