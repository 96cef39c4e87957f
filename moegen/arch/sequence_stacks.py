"""The two stacks of a model that reads one sequence and writes another."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from moegen.arch.attention import GroupedQueryAttention
from moegen.arch.cross_attention import (
    POSITIONS,
    BiasedAttention,
    CrossAttention,
    DecoderAttention,
    EncoderAttention,
)
from moegen.arch.placement import Placement
from moegen.arch.positions import Relative
from moegen.arch.stack import Stack
from moegen.graph.builder import Builder
from moegen.graph.layer import Layer
from moegen.ops.biased_attention import later_bias
from moegen.spec.element import Element


class StackOf(Element):
    """How deep a stack is, and which of its layers are routed."""

    shorthand = "layers"

    layers: int = Field(ge=1, le=2000, description="number of blocks", examples=[12])
    placement: Placement | Literal["none"] | None = Field(
        None, description="its routed layers, in place of moe.placement; none: none of them"
    )


class SequenceStack(Layer):
    """Blocks over one of the sequences, and the norm after them. Made by the model.

    ids: names of what its routers read beside tokens; routed: whether any layer is.
    """

    name: ClassVar[str] = ""

    layers: int
    ids: tuple[str, ...] = ()
    routed: bool = False
    balanced: bool = False  # whether any router has a balance bias

    def class_name(self) -> str:
        """What holds the blocks."""
        return self.scope

    def describe(self, spec: Any) -> str:
        """`Encoder: 12 layers.`"""
        return f"{self.scope}: {self.layers} layer{'s' if self.layers > 1 else ''}."

    def given(self) -> tuple[str, ...]:
        """What its routers read beside tokens."""
        return self.ids

    def update_balance(self, b: Builder, routing: Any) -> Any:
        """Pass on to the routers."""
        stack = self._stack(b)
        blocks = stack.blocks()
        for index, one in enumerate(stack.routed()):
            if one.moe.router.balance_bias:
                b.child(f"layers.{one.layer}", blocks[one.layer], routing[index].load)

    def _stack(self, b: Builder) -> Stack:
        stack: Stack = b.spec.model.stacks()[self.name]
        return stack

    def _update(self) -> tuple[str, ...]:
        return ("update_balance",) if self.balanced else ()

    def _biases(self, b: Builder, queries: Any, keys: Any, hidden: Any = None) -> dict[str, Any]:
        """Fields of a context for positions [T] that look at positions [S], some of them hidden."""
        relative = b.spec.model.positions
        unseen = {} if hidden is None else {"hidden": hidden}
        if not isinstance(relative, Relative):
            return unseen
        attention = self._stack(b).attention
        assert isinstance(attention, BiasedAttention)
        buckets = relative.buckets_of(queries, keys, not attention.causal)
        if relative.per_layer:
            return {"buckets": b.name(buckets, "buckets"), **unseen}
        bias = b.inline(relative, "bias", buckets, attention.heads, path=POSITIONS)
        if hidden is not None:
            bias = bias + hidden
        return {"bias": bias}

    def _turns(self, b: Builder, positions: Any) -> dict[str, Any]:
        """cos and sin of the rotary embedding, if there is one."""
        attention = self._stack(b).attention
        if attention.rope is None:
            return {}
        width = attention.rope.dim or attention.rope_width(b.width)
        path = ("model", "attention", "rope")
        cos, sin = b.inline(attention.rope, "tables", "frequencies", width, positions, path=path)
        return {"cos": cos, "sin": sin}

    def _run(self, b: Builder, x: Any, context: Any, told: bool) -> Any:
        """x [B, S, d] to [B, S, d], and the routing records of the layers if told."""
        routing = b.no_items() if told else None
        for layer, block in enumerate(self._stack(b).blocks()):
            if self.routed:
                x, records = b.child(f"layers.{layer}", block, x, context)
                routing = None if routing is None else routing + records
            else:
                x = b.child(f"layers.{layer}", block, x, context)
        x = self._norm(b, x)
        return x if routing is None else (x, routing)

    def _norm(self, b: Builder, x: Any) -> Any:
        return b.inline(b.spec.model.norm, "apply", "norm", x, b.width, path=("model", "norm"))


class EncoderStack(SequenceStack):
    """Blocks over the source: every position sees all real ones."""

    scope: ClassVar[str] = "Encoder"
    name: ClassVar[str] = "encoder"

    def programs(self) -> tuple[str, ...]:
        """It is run once for a source: for its losses too, or for what it makes alone."""
        return ("forward", *(("encode",) if self.routed else ()), *self._update())

    def forward(self, b: Builder, x: Any, hidden: Any, valid: Any, **ids: Any) -> Any:
        """x [B, S, d], hidden [B, 1, 1, S] and valid [B * S] to [B, S, d]."""
        return self._encoded(b, x, hidden, valid, ids, told=self.routed)

    def encode(self, b: Builder, x: Any, hidden: Any, valid: Any, **ids: Any) -> Any:
        """As forward, without records of routing."""
        return self._encoded(b, x, hidden, valid, ids, told=False)

    def _encoded(
        self, b: Builder, x: Any, hidden: Any, valid: Any, ids: dict[str, Any], told: bool
    ) -> Any:
        positions = torch.arange(x.shape[1], device=x.device)
        fields = self._biases(b, positions, positions, hidden)
        fields |= self._turns(b, positions)
        if self.routed:
            fields |= {"valid": valid, **ids}
        context = b.record("EncoderContext", **fields)
        return self._run(b, x, context, told)


class DecoderStack(SequenceStack):
    """Blocks over the target: every position sees those before it, and the whole source."""

    scope: ClassVar[str] = "Decoder"
    name: ClassVar[str] = "decoder"

    def programs(self) -> tuple[str, ...]:
        """Training, decoding, and the cache that decoding needs."""
        return ("forward", "step", "new_cache", *self._update())

    def forward(self, b: Builder, x: Any, memory: Any, source: Any, valid: Any, **ids: Any) -> Any:
        """x [B, T, d], memory [B, S, d], source [B, 1, 1, S] and valid [B * T] to [B, T, d]."""
        positions = torch.arange(x.shape[1], device=x.device)
        fields = {"memory": memory, "source": source}
        fields |= {**self._biases(b, positions, positions), **self._turns(b, positions)}
        if self.routed:
            fields |= {"valid": valid, **ids}
        context = b.record("DecoderContext", **fields)
        return self._run(b, x, context, self.routed)

    def step(self, b: Builder, x: Any, start: Any, cache: Any, source: Any, **ids: Any) -> Any:
        """x [B, T, d] at positions start, start + 1, ... to [B, T, d]; fills the cache."""
        positions = start + torch.arange(x.shape[1], device=x.device)
        fields: dict[str, Any] = {"start": start, "positions": positions, "source": source}
        if isinstance(b.spec.model.positions, Relative):
            keys = torch.arange(cache[0][0][0].shape[2], device=x.device)
            hidden = later_bias(positions, keys, b.spec.precision.compute_dtype)
            fields |= self._biases(b, positions, keys, hidden)
        place = b.record("Place", **fields, **self._turns(b, positions), **ids)
        for layer, block in enumerate(self._stack(b).blocks()):
            x = b.child(f"layers.{layer}", block, x, place, cache[layer])
        return self._norm(b, x)

    def new_cache(self, b: Builder, memory: Any, length: Any) -> Any:
        """Empty caches of up to `length` tokens, and keys and values of the source."""
        return tuple(
            b.child(f"layers.{layer}", block, memory, length)
            for layer, block in enumerate(self._stack(b).blocks())
        )


def within(attention: GroupedQueryAttention, positions: Any, *, encoder: bool) -> BiasedAttention:
    """Attention within a stack, from the section that all attention of the model shares."""
    said = {n: getattr(attention, n) for n in attention.model_fields_set if n != "kind"}
    said.setdefault("rope", None)
    if isinstance(positions, Relative):
        said |= {"relative": positions} if positions.per_layer else {"shared": True}
    return EncoderAttention(**said) if encoder else DecoderAttention(**said)


def across(attention: GroupedQueryAttention) -> CrossAttention:
    """Attention to the source, from the same section."""
    said = {n: getattr(attention, n) for n in attention.model_fields_set}
    return CrossAttention(of=GroupedQueryAttention(**{**said, "rope": None}))
